"""Makes `fairseq-hydra-train task=qn_masked_lm` work.

Installed as `hydra_plugins.fairseq_qn`, where Hydra looks for plugins. Hydra asks its plugins for search
paths before it composes, and so before fairseq reads `common.user_dir`.
"""

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class FairseqQNSearchPath(SearchPathPlugin):
    """Registers fairseq_qn's tasks, models and criterion; adds the shipped configs after fairseq's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder of shipped YAML files, in a program that uses fairseq alone."""
        # Another Hydra program in the same environment must not pay for importing torch and fairseq.
        if "fairseq" not in sys.modules:
            return
        import fairseq_qn  # noqa: F401  (registers on import)
        from fairseq_qn.config_dir import config_dir

        search_path.append("fairseq-qn", f"file://{config_dir()}")
