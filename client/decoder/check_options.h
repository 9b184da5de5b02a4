// What DecoderOptions may hold.
#ifndef KVSEEK_CLIENT_DECODER_CHECK_OPTIONS_H_
#define KVSEEK_CLIENT_DECODER_CHECK_OPTIONS_H_

#include <cstddef>

#include "absl/status/status.h"
#include "client/sparse_decoder.h"

namespace kvseek::client {

/// invalid_argument that names the field; `daemons` is how many there are.
absl::Status CheckOptions(const DecoderOptions& options, size_t daemons);

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_CHECK_OPTIONS_H_
