"""Runs studies: notebooks executed by papermill, each a task of a Dask cluster; and what is published."""
