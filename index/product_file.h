// A product index as bytes: its sections of a saved index (index_file.h has the layout).
#ifndef KVSEEK_INDEX_PRODUCT_FILE_H_
#define KVSEEK_INDEX_PRODUCT_FILE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "index/file_bytes.h"
#include "index/product_index.h"

namespace kvseek::index {

void AppendProduct(const ProductIndex& index, std::string& to);

/// Null if it cannot be read; the reader says why.
std::shared_ptr<const ProductIndex> ReadProduct(int64_t covered, const KvShape& shape,
                                                Reader& reader);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_PRODUCT_FILE_H_
