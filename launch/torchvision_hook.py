"""Copied into the environment by setup_env.sh: runs othink_ray.torchvision_ops just before torchvision's first import.

Loaded by a .pth file at every interpreter start, so it imports nothing and only adds one finder.
"""

import sys


class TorchvisionFinder:
    """Finds torchvision as usual, and lets its missing operators be declared before its code runs."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run_module = spec.loader.exec_module

            def declare_then_run(module):
                try:
                    from othink_ray.torchvision_ops import declare_if_missing
                except ImportError:  # the checkout moved: torchvision's own error is the one to show
                    pass
                else:
                    declare_if_missing()
                run_module(module)

            spec.loader.exec_module = declare_then_run
        return spec


sys.meta_path.insert(0, TorchvisionFinder)
