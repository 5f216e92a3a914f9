"""What the model of a spec is called where it is kept: never the name of a model that is in use."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from tidemill.tasks.training.spec import Spec


def kept_as(name: str, *identity: Any) -> str:
    """`name` as a model's name may be, and eight hex digits that tell models of another identity (JSON values) apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:80] or "spec"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{plain}-{digest[:8]}"


def own_modules(spec: Spec) -> Sequence[str]:
    """The modules that a spec names: whoever runs it allows them to be loaded."""
    return [path.partition(":")[0] for path in spec.import_paths]
