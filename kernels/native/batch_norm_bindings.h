#pragma once

#include <nanobind/nanobind.h>

void bind_batch_norm(nanobind::module_& m);
