"""All methods, by their names."""

from __future__ import annotations

from reltune.methods.bitfit import BitFit
from reltune.methods.columns import Columns
from reltune.methods.contract import Method
from reltune.methods.directions import Directions
from reltune.methods.dora import DoRA
from reltune.methods.full import Full
from reltune.methods.head import Head
from reltune.methods.layers import Layers
from reltune.methods.lora import Lora
from reltune.methods.rows import Rows
from reltune.methods.rslora import RsLora
from reltune.methods.shira import Shira
from reltune.methods.weights import Weights

METHODS: dict[str, Method] = {
    "weights": Weights(),
    "columns": Columns(),
    "rows": Rows(),
    "directions": Directions(),
    "lora": Lora(),
    "rslora": RsLora(),
    "dora": DoRA(),
    "shira": Shira(),
    "bitfit": BitFit(),
    "layers": Layers(),
    "head": Head(),
    "full": Full(),
}
