"""Compute kernels: the package's ops, their reference implementations and the native extension.

`ops` contains the public functions, `reference` the same functions in plain torch, and `native` the calls into the
compiled extension `fedspine_edge._C`, whose sources are in csrc/. docs/concepts/kernels.md describes every op.
"""
