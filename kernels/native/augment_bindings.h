#pragma once

#include <nanobind/nanobind.h>

void bind_augment(nanobind::module_& m);
