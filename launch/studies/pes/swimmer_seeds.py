"""Figure 8 of the PES paper with nine seeds: who is first, and how sure is that?

python -m launch.reproduce swimmer_seeds --workdir=DIR

Needs the extra ``control``. The study ``swimmer`` with three times its seeds, none of which had a
part in the choice of a rate, and every run in full length. Five minutes on sixteen cores, hours on
two. Quick: that of ``swimmer``.
"""

from functools import partial

from launch.studies.base import Study
from launch.studies.pes import swimmer

MORE = ((31, 37, 41), (43, 47, 53))

STUDY = Study(
    "the study `swimmer` with nine seeds",
    90.0,
    partial(swimmer.run, more=MORE),
    keeps=True,
    needs="control",
)
