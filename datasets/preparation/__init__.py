"""Programs that create and examine cube files. Training imports the synthetic universe only."""
