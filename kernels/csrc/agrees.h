// Whether an instruction set multiplies integers as another one does. Sets that no machine of ours
// runs are tried once, before they are chosen, and left alone where they differ.
#pragma once

#include "isa.h"

namespace ffn {

bool agrees(const Isa& isa, const Isa& other);

}  // namespace ffn
