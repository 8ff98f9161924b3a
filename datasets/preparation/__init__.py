"""Programs that create and examine cube files, and the checks that training makes as well."""
