"""Export: what a run trained, as folders and files that others load.

Owns merging, packing, conversion, the artifacts' folders and the push. Must not know tasks, trainers or notebooks.

    python -c "from lib.export import export_run; from lib.runfolder import read_run; \
               print(export_run(read_run('outputs/decisions')))"
"""

from lib.export.artifacts import export_run, push_exported, push_run
from lib.export.errors import ExportError
from lib.export.folder import Artifact, check_artifact

__all__ = ["Artifact", "ExportError", "check_artifact", "export_run", "push_exported", "push_run"]
