"""vGROUT: vector gradient routing for GRPO. BEARTYPE=1 checks every annotated shape and type at
run time."""

import os

if os.environ.get("BEARTYPE") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("vgrout", "beartype.beartype")
