// Checks of shapes that both directions make: of what a caller asks, and of what a daemon says.
#ifndef KVSEEK_CLIENT_SHAPE_CHECKS_H_
#define KVSEEK_CLIENT_SHAPE_CHECKS_H_

#include <cstdint>
#include <initializer_list>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "client/kv_client.h"

namespace kvseek::client {

/// Saturates, so that a product of hostile sizes is too large and not small.
uint64_t Product(std::initializer_list<uint64_t> factors);

/// invalid_argument naming `prefix` and the field, unless it is the shape of a model.
absl::Status CheckShape(const ModelShape& shape, absl::string_view prefix);

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_SHAPE_CHECKS_H_
