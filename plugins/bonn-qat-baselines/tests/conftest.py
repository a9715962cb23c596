import importlib.metadata
import os

# Before any test asks for them: all baselines, and no observer that would open a tracking store. Where the tests of the
# core run as well, what they chose stays.
_installed = (entry.name for entry in importlib.metadata.entry_points(group="bonn_qat"))
os.environ.setdefault("BONN_QAT_PLUGINS", ",".join(name for name in _installed if name.startswith("baselines.")))
