"""Patches of ten photographs: which one is it from? (See ``tasks.data.patches`` for the splits.)"""

import functools

from tasks.data.packaged import packaged_file
from tasks.data.patches import read as read_patches
from tasks.data.splits import Raw, Source

# Distribution, file.
PHOTOGRAPHS = (
    ("scikit-image", "skimage/data/astronaut.png"),  # NASA; public domain.
    ("scikit-image", "skimage/data/chelsea.png"),  # S. van der Walt; CC0.
    ("scikit-image", "skimage/data/coffee.png"),  # R. Michetti; CC0.
    ("scikit-image", "skimage/data/hubble_deep_field.jpg"),  # NASA; public domain.
    ("scikit-image", "skimage/data/motorcycle_left.png"),  # Scharstein et al. 2014, to be cited.
    ("scikit-image", "skimage/data/retina.jpg"),  # M. Haggstrom; CC0.
    ("scikit-image", "skimage/data/rocket.jpg"),  # SpaceX; public domain.
    ("scikit-learn", "sklearn/datasets/images/china.jpg"),  # danielbuechele; CC BY 2.0.
    ("scikit-learn", "sklearn/datasets/images/flower.jpg"),  # vultilion; CC BY 2.0.
    ("matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg"),  # US Navy; public domain.
)


def read(side: int, color: bool) -> tuple[Raw, int]:
    """Patches uint8 ``[N, side, side, 3 or 1]``, and 10 classes."""
    return read_patches([packaged_file(*file) for file in PHOTOGRAPHS], side, color)


DATASETS = {
    f"patches_{side}{'_color' if color else ''}": Source(
        functools.partial(read, side, color),
        f"patches of 10 photographs, {'colour' if color else 'grey'}, {side}x{side}",
        "photographs in scikit-image, scikit-learn and matplotlib",
        "public domain, CC0, CC BY 2.0 (china, flower), free with citation (motorcycle)",
    )
    for side in (8, 16, 32)
    for color in (False, True)
}
