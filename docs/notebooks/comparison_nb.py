# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Read a comparison
#
# A table of accuracies says little without its noise. This notebook trains three schemes with three seeds on
# scikit-learn's digits, and asks what may be concluded. It needs the extra `compare` and `plugins/bonn-qat-baselines`.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import bonn_qat
from bonn_qat import Recipe
from bonn_qat.studies.compare import compare, plan

EPOCHS = 3
SEEDS = 3
data = bonn_qat.load_data("digits")
recipe = replace(Recipe.default("digits"), epochs=EPOCHS)
folder = Path(tempfile.mkdtemp())
comparison = compare(plan(recipe, schemes=["float", "xnor", "bonn"], seeds=range(SEEDS)), data, folder)

# %% [markdown]
# On the command line this is `bonn-qat compare --schemes float,xnor,bonn --seeds 3 --epochs 3`. It trains every arm
# with the same network, data order and budget, and reports the last epoch, never the best one.

# %%
comparison

# %% [markdown]
# ## What the columns say
#
# - **test top-1**: mean and standard deviation over the seeds. It is the spread of single runs, not the error of
#   the mean.
# - **size, times smaller**: with one bit for each binary weight.
# - **binary MACs**: the share of the products that are of bits. What is left decides the speed.
# - **flips**: how many binary weights changed sign in an epoch. It falls as the rate comes down.
#
# ## What a difference says
#
# Below the table each baseline has a line. Differences are paired by seed: the runs of a seed share their start and the
# order of the images, so what they have in common cancels. Two margins belong to each:
#
# - that of the **seeds**: another seed gives another number. It shrinks with more seeds.
# - that of the **test images**: another test set gives another number. It shrinks with more test images, and no number
#   of seeds helps. On 359 images a point is less than four images.
#
# Only what exceeds both is larger than the noise.

# %%
from bonn_qat.studies import statistics

for difference in statistics.differences(comparison):
    print(difference.other)
    print("  by seed:", {seed: round(points, 2) for seed, points in difference.by_seed.items()})
    print("  verdict:", difference.verdict, difference.noise)

# %% [markdown]
# ## What it does not say
#
# - **Which scheme is better elsewhere.** Three epochs on small images say nothing about ImageNet. A scheme that starts
#   fast may end lower.
# - **Which is better at its best rate.** All arms share one learning rate. `bonn-qat reproduce --rates` searches it for
#   each arm on held-out training images.
# - **That there is no difference**, where the verdict is "within the noise". It says that this comparison cannot see
#   it.
#
# Of twenty differences that are only noise, one may still pass.
#
# ## What is in the folder
#
# The results are files: the same command continues an interrupted comparison, and `bonn-qat report FOLDER` writes
# the page again.

# %%
print(*sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())[:8], sep="\n")
