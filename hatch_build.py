"""The package's build compiles the native kernels. Without a compiler the package is built all the same, and runs on PyTorch."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the shared library beside its sources, and a tag of this platform on the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / "src" / "ownlm" / "kernels"
        spec = importlib.util.spec_from_file_location("ownlm_kernels_build", folder / "build.py")
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        for old in folder.glob("kernels-*.so"):
            if old.name != build.file_name():
                old.unlink()
        try:
            path = folder / build.file_name()
            if not path.exists():
                build.build(folder)
        except (OSError, subprocess.CalledProcessError) as fault:
            print(f"the native kernels were not compiled: {fault}", file=sys.stderr)  # noqa: T201
            return
        build_data["artifacts"].append("/src/ownlm/kernels/kernels-*.so")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
