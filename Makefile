# Everything a fresh machine needs: Python 3.11 (or newer), pip, make and the package registry.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
QUICKSTART := output/quickstart

export DETECTRON2_DATASETS ?= datasets

.PHONY: install quickstart test clean

install: $(STAMP)

# Detectron2's wheel is tagged for one Python but its Python files run on any: --target puts it
# into our site-packages without a compiler; the hash in the requirements file pins its content.
$(STAMP): requirements/lock.txt requirements/detectron2.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements/lock.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --upgrade \
	  --only-binary=:all: --implementation cp --python-version 3.10 --abi none --abi cp310 \
	  --platform any -r requirements/detectron2.txt \
	  --target $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m nuclei_d2.doctor
	touch $@

quickstart: install
	$(BIN)/python tools/train_net.py --config-file configs/quick_schedules/quickstart.yaml \
	  OUTPUT_DIR $(QUICKSTART)
	$(BIN)/python tools/demo.py --config-file $(QUICKSTART)/config.yaml \
	  --input $(DETECTRON2_DATASETS)/synthetic/images/test_00*.png \
	  --ground-truth $(DETECTRON2_DATASETS)/synthetic/labels --boundaries \
	  --output $(QUICKSTART)/demo --opts MODEL.WEIGHTS $(QUICKSTART)/model_final.pth
	@echo "Look at $(QUICKSTART)/demo/*.png; the numbers are in $(QUICKSTART)/results.json"

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf output build *.egg-info
