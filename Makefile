# Every target is a line that a person could type. `setup` runs by itself where a target needs it.
PYTHON ?= python3
BIN := .venv/bin
# MLX's own BLAS is slow on Linux. Where Debian's libopenblas0-pthread is installed, the tests load it
# first. PyTorch's products then use it too, and PyTorch has threads of its own, so OpenBLAS gets one.
OPENBLAS := $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libblas.so.3)
PRELOAD := $(if $(OPENBLAS),LD_PRELOAD=$(firstword $(OPENBLAS)) OPENBLAS_NUM_THREADS=1)

.PHONY: setup web demo test check bench data-scale fuzz ort-op-fuzz ort-op-sanitize oldest-onnx metal-races metal-compile \
	report wheel publish kill-tests power-cut audit clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[mlx,torch,onnx,data,json,chat,serve,plot,dev]'
	touch $@

# Packages for the web page and for the tests in node and in a browser.
web:
	npm install --silent --prefix export/web
	npm install --silent --prefix tests/clients

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

# Two processes with one thread each: the tests make many small products, which gain nothing from
# more threads.
test: setup
	$(PRELOAD) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_docs.py

bench: setup
	$(BIN)/python benchmarks/feedback_solve.py
	$(BIN)/python benchmarks/mixer.py --device cpu
	$(BIN)/python benchmarks/ort_op.py
	$(BIN)/python benchmarks/exported_model.py

# Synthetic text through `sessa data tokenize` and training, with the memory that both take. CI runs
# it with BYTES=5e6 STEPS=30.
BYTES ?= 10e9
STEPS ?= 1000
data-scale: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data_scale.py \
		--bytes $(BYTES) --steps $(STEPS)
	rm -rf data-scale

# Damaged files through every command that reads them; failures are shown, cases go to fuzz.log.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/reading.py --count 50000 > fuzz.log

ort-op-fuzz: setup
	$(BIN)/python tests/support/ort_op_fuzz.py --count 2000

ort-op-sanitize: setup
	$(BIN)/python tests/support/ort_op_fuzz.py --count 2000 --sanitize

# The tests of exported models with the oldest onnx and onnxruntime that pyproject.toml allows.
OLDEST_ONNX := $(shell sed -n 's/^onnx = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",' | sed 's/>=/==/g')
oldest-onnx: setup
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv/oldest-onnx $(OLDEST_ONNX)
	PYTHONPATH=.venv/oldest-onnx OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		tests/sessa_export/test_onnxruntime.py tests/sessa_export/test_exporter.py

metal-races: setup
	$(BIN)/python tools/metal_emulator/races.py

# Writes every Metal text into metal-texts/ and, on a Mac, gives each to Apple's compiler.
metal-compile: setup
	$(BIN)/python tools/compile_metal.py metal-texts

# `sessa selftest`, a short training run and generation in one framework; what they print is kept.
BACKEND ?= torch
report: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/report.sh $(BACKEND) report

# The wheel is built from the source distribution, which proves that this is complete. uv gets a
# folder of its own, so that .venv keeps the exact versions.
UV := .venv/uv/bin/uv
$(UV): .venv/.installed
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt --target .venv/uv uv
	touch $@

wheel: $(UV)
	rm -rf dist
	$(UV) build --build-constraints constraints.txt
	$(BIN)/python tools/check_wheel.py dist

# Uploads dist/ to PyPI from the release workflow, if the tag in the variable TAG names its version.
publish: $(UV)
	$(BIN)/python tools/check_wheel.py dist --tag "$$TAG"
	$(UV) publish --trusted-publishing always dist/*.whl dist/*.tar.gz

# Kills commands at 300 of their writes and looks at what they leave.
kill-tests: setup
	OMP_NUM_THREADS=1 KILLS=300 $(BIN)/python -m pytest tests/sessa_cli/test_kills.py -k a_kill

# Cuts the power of a loop device, as root, while commands write to it and after their last word.
power-cut: setup
	OMP_NUM_THREADS=1 CUTS=100 $(BIN)/python -m pytest tests/sessa_cli/test_kills.py -k power_cut

# Needs the network. pip-audit gets a folder of its own, so that .venv keeps the exact versions.
audit: setup
	$(BIN)/pip install --quiet --target .venv/audit pip-audit
	PYTHONPATH=.venv/audit $(BIN)/python tools/audit.py

clean:
	rm -rf .venv demo dist metal-texts report
