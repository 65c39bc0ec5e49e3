#pragma once

#include <nanobind/nanobind.h>

void bind_aw_hinge(nanobind::module_& m);
