"""The rows that the MAD paper prints (Tables 3-5): other data than ours, shown apart and never ranked with ours."""

from __future__ import annotations

NOTE = "published, on other data; not comparable"

_LINEAR = ("Background", "Gray Matter", "Leptomeninges", "Superficial Cortex", "White Matter")
_MODELS = ("MAD-NP", "DINOv2 Giant Finetuned", "Prov-GigaPath", "UNI2", "UNI", "Virchow2")
_F1 = {
    "linear": [
        (0.9188, 0.9059, 0.9185, 0.9148, 0.9168, 0.9085),
        (0.9328, 0.9243, 0.9339, 0.9318, 0.9311, 0.9230),
        (0.9127, 0.8895, 0.9063, 0.9045, 0.9048, 0.8911),
        (0.9267, 0.8964, 0.9128, 0.9105, 0.9089, 0.8899),
        (0.9625, 0.9568, 0.9652, 0.9643, 0.9610, 0.9551),
    ],
    "knn": [
        (0.9160, 0.8961, 0.9021, 0.9052, 0.9176, 0.9018),
        (0.9297, 0.9131, 0.9311, 0.9267, 0.9359, 0.9161),
        (0.9137, 0.8948, 0.8947, 0.8957, 0.9065, 0.8883),
        (0.9196, 0.8858, 0.9113, 0.9116, 0.9119, 0.8805),
        (0.9640, 0.9564, 0.9674, 0.9655, 0.9703, 0.9493),
    ],
}
_AMI = (0.7668, 0.5275, 0.4732, 0.4478, 0.2975, 0.3597)
_DBI = (1.2821, 1.4133, 2.0342, 2.3078, 1.9559, 1.2867)

TABLE3: dict[str, dict[str, float]] = {
    model: {
        **{f"{kind} {name}": rows[line][place] for kind, rows in _F1.items() for line, name in enumerate(_LINEAR)},
        "ami": _AMI[place],
        "dbi": _DBI[place],
    }
    for place, model in enumerate(_MODELS)
}
"""Model -> "linear CLASS", "knn CLASS" (F1), "ami", "dbi"."""

_TABLE4 = ("s_pos", "s_neg_same", "delta_hier", "s_neg_diff", "delta_sem")
TABLE4: dict[str, dict[str, float]] = {
    model: dict(zip(_TABLE4, values, strict=True))
    for model, values in {
        "MAD-NP": (0.716, 0.577, 0.138, 0.221, 0.356),
        "DINOv2 Giant Finetuned": (0.306, 0.237, 0.069, 0.081, 0.156),
        "UNI2": (0.488, 0.417, 0.071, 0.343, 0.074),
        "Prov-GigaPath": (0.401, 0.335, 0.066, 0.297, 0.038),
        "UNI": (0.576, 0.528, 0.048, 0.468, 0.060),
        "Virchow2": (0.495, 0.435, 0.060, 0.393, 0.043),
    }.items()
}

_TABLE5 = ("coarse iou", "coarse dice", "coarse accuracy", "fine iou", "fine dice", "fine accuracy", "consistency")
TABLE5: dict[str, dict[str, float]] = {
    model: dict(zip(_TABLE5, values, strict=True))
    for model, values in {
        "MAD-NP": (0.8875, 0.9368, 0.9299, 0.8584, 0.9193, 0.9100, 96.7),
        "UNI2": (0.8906, 0.9388, 0.9326, 0.8018, 0.8421, 0.8352, 90.0),
        "Prov-GigaPath": (0.8879, 0.9370, 0.9293, 0.7245, 0.7967, 0.8290, 81.6),
        "UNI": (0.8961, 0.9419, 0.9364, 0.7212, 0.7968, 0.8166, 80.5),
        "DINOv2 Giant Finetuned": (0.8889, 0.9375, 0.9313, 0.5761, 0.6477, 0.6384, 64.8),
        "Virchow2": (0.8865, 0.9332, 0.9256, 0.7176, 0.8233, 0.7521, 81.0),
    }.items()
}
