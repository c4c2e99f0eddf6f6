"""Every shape annotation of the package is checked at run time while the tests run."""

import importlib

import torch
from jaxtyping import install_import_hook

hook = install_import_hook("squall", "typechecking.check")
if torch.cuda.is_available():  # Triton compiles a kernel from its source, without the checks around it
    importlib.import_module("squall.losses")
    hook.uninstall()
    importlib.import_module("squall.losses.fused_triton")
    install_import_hook("squall", "typechecking.check")
