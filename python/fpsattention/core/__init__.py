"""The library below its schedules and hosts: checks, geometry, configs, reference, ops. Imports torch and _C only."""
