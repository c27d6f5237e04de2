//! What a build without the feature says.

use std::sync::Arc;

use super::Request;
use crate::Result;
use crate::data::pictures::{Pictures, SourceOptions};

/// Refuses.
pub(crate) fn open(request: &Request, _: &SourceOptions) -> Result<Arc<dyn Pictures>> {
    let wanted = match (&request.picture, &request.label) {
        (None, None) => String::new(),
        columns => format!(" (columns {columns:?})"),
    };
    let count = request.files.len();
    Err(request.refuse(format!(
        "this program was built without parquet: build it with `cargo build --release --features parquet` to read {count} \
         parquet file{}{wanted}",
        if count == 1 { "" } else { "s" }
    )))
}
