"""What every start imports sooner or later: the fork server imports it once."""

import importlib

from numba.core.registry import cpu_target

MODULES = ["trainer", "analysis.figures", "accelerate.commands.accelerate_cli", "torch._dynamo"]
MODULES += ["torch.distributed.run", "torch.utils.tensorboard", "test_accelerator"]

for module in MODULES:
    importlib.import_module(module)
cpu_target.typing_context.refresh()  # takes a second, otherwise in every child
cpu_target.target_context.refresh()
