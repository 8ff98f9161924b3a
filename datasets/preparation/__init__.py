"""Programs that create and examine cube files; training never imports them."""
