"""One module per command, in the order of its steps.

Every `run_*` function resumes an unfinished run, returns a finished one unchanged, and raises
ConfigError for what the user can fix: an invalid config, invalid data, or too small a cluster.
"""
