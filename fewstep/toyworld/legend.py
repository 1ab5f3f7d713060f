"""The legend of the toy world's scores: one sentence for each."""

from fewstep.evaluation.score import Score

LEGEND = (
    Score(
        "frechet",
        "Frechet distance",
        "How far the clips' features are from those of real clips, each set taken as a Gaussian, extrapolated to "
        "infinitely many clips; real clips get about 0, and noise can make it slightly negative.",
        "lower",
        is_headline=True,
    ),
    Score(
        "recall",
        "Recall",
        "Share of real clips that lie close to some made clip: how much of the world the model can make at all.",
        "higher",
        is_headline=True,
    ),
    Score(
        "coverage",
        "Coverage",
        "Share of real clips with a made one in their neighbourhood; it falls when the same few clips come again and again.",
        "higher",
        is_headline=True,
    ),
    Score(
        "adherence",
        "Prompt adherence",
        "Share of clips in which every colour of the caption is found in its shape, and no other object.",
        "higher",
        is_headline=True,
    ),
    Score(
        "gravity",
        "Gravity",
        "Acceleration in m/s\u00b2 of objects in free flight, the median over flights; this world falls with 9.81.",
        "as real",
        is_headline=True,
    ),
    Score(
        "permanence",
        "Permanence",
        "Share of frames in which a found object is seen, or may be hidden by another or by the border.",
        "higher",
        is_headline=True,
    ),
    Score(
        "frechet_plain",
        "Frechet distance, plain",
        "Without the extrapolation: compare at equal numbers of clips only.",
        "lower",
    ),
    Score("frechet_random_net", "Frechet distance, untrained network", "A witness nobody tuned, extrapolated.", "lower"),
    Score("mmd", "MMD", "Unbiased discrepancy with a cubic kernel on the same features; steadier for few clips.", "lower"),
    Score("precision", "Precision", "Share of made clips that lie close to some real clip.", "higher"),
    Score(
        "density", "Density", "How many real neighbourhoods a made clip lies in, over the usual number; can exceed 1.", "higher"
    ),
    Score("vendi", "Vendi score", "Effective number of different clips.", "as real"),
    Score("seed_diversity", "Seed diversity", "Mean feature distance between clips of one prompt.", "as real"),
    Score("adherence_colours", "Adherence, colours", "Adherence without the shapes.", "higher"),
    Score("adherence_chance", "Adherence by chance", "Adherence of the same clips to the captions of others.", "as real"),
    Score("count", "Count", "Share of clips with as many objects as the caption names.", "higher"),
    Score("shape", "Shape", "Share of the captions' objects that are found with the right shape.", "higher"),
    Score("direction", "Direction", "Share of the objects that should go left or right and do, in the first frames.", "higher"),
    Score("second_difference_px", "Bend of tracks", "In px per frame squared; 0 for a frozen clip.", "as real"),
    Score(
        "flights", "Flights", "Stretches of free flight found in a clip; where they are few, gravity means little.", "as real"
    ),
    Score(
        "gravity_ratio",
        "Gravity ratio",
        "The median over all flights, over that of the real clips: 1 is this world.",
        "as real",
    ),
)
