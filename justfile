# Commands of daily work. `just` alone lists them.

default:
    @just --list

# Install siv and what its tests need into the active environment
init:
    pip install -e '.[test]'

# Fast tests
test *ARGS:
    python -m pytest {{ARGS}}

# Fast and slow tests
test-all *ARGS:
    python -m pytest -m 'not gpu' {{ARGS}}

# What CI checks beside the tests
lint:
    ruff check .
    ruff format --check .
    mypy
    lint-imports

# Put code in order
fix:
    ruff check --fix .
    ruff format .

# The step against a naive implementation of the same step, interleaved
bench *ARGS:
    python tests/bench_step.py {{ARGS}}

# The step against the published code's, from a clone of taldatech/soft-intro-vae-pytorch
bench-published FOLDER *ARGS:
    python tests/bench_published.py {{FOLDER}} {{ARGS}}

# Two processes with a thread each against one
bench-scaling *ARGS:
    python tests/bench_scaling.py {{ARGS}}

# Rows read ahead against rows on the device, at 32 or 256 pixels
bench-data *ARGS:
    python tests/bench_data.py {{ARGS}}

# A sampled KL to a mixture against the naive form, interleaved
bench-prior:
    python tests/bench_prior.py

# Kills, fuzzed recipes and damaged files at full size (docs/reliability.md), and recipes at their own length or batch
campaign *ARGS:
    SIV_CAMPAIGN_RECIPES=10000 SIV_CAMPAIGN_FILES=2000 SIV_CAMPAIGN_CHECKPOINTS=600 SIV_CAMPAIGN_KILLS=1000 \
        SIV_CAMPAIGN_ARRAYS=1000 SIV_CAMPAIGN_CALLS=100000 python -m pytest --timeout 0 tests/test_fuzz_recipes.py \
        tests/test_fuzz_data.py tests/test_fuzz_inputs.py tests/test_fuzz_checkpoints.py tests/test_kills.py {{ARGS}}
    SIV_CAMPAIGN_BATCH=64 python -m pytest -m slow tests/test_jobs.py -k full_translation
    SIV_CAMPAIGN_DIGITS=1 python -m pytest -m slow tests/test_images.py
    SIV_CAMPAIGN_TRIALS=12 SIV_CAMPAIGN_SHORT_TRIALS=1000 python -m pytest -m slow tests/test_cluster.py
