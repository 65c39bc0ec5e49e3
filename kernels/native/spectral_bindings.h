#pragma once

#include <nanobind/nanobind.h>

void bind_spectral(nanobind::module_& m);
