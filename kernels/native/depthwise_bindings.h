#pragma once

#include <nanobind/nanobind.h>

void bind_depthwise(nanobind::module_& m);
