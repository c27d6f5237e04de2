//! Which columns hold pictures and classes.

use parquet::basic::{CompressionCodec, LogicalType, Type as Physical};
use parquet::file::metadata::ParquetMetaData;
use parquet::schema::types::SchemaDescriptor;

/// Classes, at most.
pub(super) const MOST_CLASSES: i64 = 1_000_000;
/// Names of columns that hold pictures, and classes, in order of preference.
const PICTURES: [&str; 8] = ["image", "img", "picture", "photo", "pixel_values", "jpg", "jpeg", "png"];
const LABELS: [&str; 5] = ["label", "labels", "cls", "class", "fine_label"];

/// Refuses columns of pictures or classes whose compression is not read here: every one of their values would be bad.
pub(super) fn check_compression(
    metadata: &ParquetMetaData,
    pictures: usize,
    classes: Option<usize>,
) -> std::result::Result<(), String> {
    let known = [CompressionCodec::UNCOMPRESSED, CompressionCodec::SNAPPY];
    let columns = [
        Some((pictures, "with the pictures", "without, which hardly makes them larger", "none")),
        classes.map(|at| (at, "with the classes", "with Snappy", "snappy")),
    ];
    for (at, what, otherwise, codec) in columns.into_iter().flatten() {
        let mut chunks = metadata.row_groups().iter().map(|group| group.column(at));
        if let Some(chunk) = chunks.find(|chunk| !known.contains(&chunk.compression_codec())) {
            return Err(format!(
                "the column {} {what} is compressed with {:?}, and only SNAPPY or none is read; write the file once more \
                 {otherwise}: in Python, pyarrow.parquet.write_table(pyarrow.parquet.read_table(OLD), NEW, \
                 compression=\"{codec}\")",
                chunk.column_path().string(),
                chunk.compression_codec()
            ));
        }
    }
    Ok(())
}

/// The columns as a person would list them.
fn columns(schema: &SchemaDescriptor) -> String {
    let fields = schema.root_schema().get_fields().iter().map(|field| {
        let inside = if field.is_group() {
            let names: Vec<&str> = field.get_fields().iter().map(|inner| inner.name()).collect();
            format!("group of {}", names.join(", "))
        } else {
            format!("{:?}", field.get_physical_type())
        };
        format!("{} ({inside})", field.name())
    });
    let all: Vec<String> = fields.collect();
    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
}

/// The leaf with the bytes of pictures: `bytes` of a group, or a column of bytes that is not text.
pub(super) fn picture_column(schema: &SchemaDescriptor, wanted: Option<&str>) -> std::result::Result<usize, String> {
    let mut candidates = Vec::new();
    for (at, column) in schema.columns().iter().enumerate() {
        let bytes = column.physical_type() == Physical::BYTE_ARRAY && column.max_rep_level() == 0;
        match column.path().parts() {
            [name, inner] if bytes && inner == "bytes" => candidates.push((name.as_str(), at, true)),
            [name] if bytes && !matches!(column.logical_type_ref(), Some(LogicalType::String | LogicalType::Json)) => {
                candidates.push((name.as_str(), at, false));
            }
            _ => (),
        }
    }
    let there = columns(schema);
    if let Some(wanted) = wanted {
        let found = candidates.iter().find(|(name, ..)| *name == wanted);
        return found.map(|(_, at, _)| *at).ok_or_else(|| {
            format!("there is no column {wanted} with pictures (bytes, or a group with bytes); the columns are {there}")
        });
    }
    let named = PICTURES.iter().find_map(|known| candidates.iter().find(|(name, ..)| name == known));
    let mut groups = candidates.iter().filter(|(_, _, group)| *group);
    let only = |mut found: Vec<usize>| if found.len() == 1 { found.pop() } else { None };
    named
        .map(|(_, at, _)| *at)
        .or_else(|| only(groups.by_ref().map(|(_, at, _)| *at).collect()))
        .or_else(|| only(candidates.iter().map(|(_, at, _)| *at).collect()))
        .ok_or_else(|| {
            format!(
                "no column looks like pictures (bytes, or a group with bytes, called image or alone of its kind); the columns \
                 are {there}. Name one with FILE.parquet#COLUMN"
            )
        })
}

pub(super) fn label_column(
    schema: &SchemaDescriptor,
    wanted: Option<&str>,
) -> std::result::Result<Option<usize>, String> {
    let find = |wanted: &str| {
        schema.columns().iter().position(|column| {
            let number = matches!(column.physical_type(), Physical::INT32 | Physical::INT64);
            number && column.max_rep_level() == 0 && column.path().parts() == [wanted]
        })
    };
    match wanted {
        None => Ok(LABELS.iter().find_map(|name| find(name))),
        Some(wanted) => find(wanted).map(Some).ok_or_else(|| {
            format!("there is no column {wanted} with whole numbers for classes; the columns are {}", columns(schema))
        }),
    }
}

/// Hugging Face's names of the classes of a column.
pub(super) fn class_names(metadata: &ParquetMetaData, column: &str) -> Option<Vec<String>> {
    let pairs = metadata.file_metadata().key_value_metadata()?;
    let text = pairs.iter().find(|pair| pair.key == "huggingface")?.value.as_deref()?;
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let names = value.pointer("/info/features")?.get(column)?.get("names")?.as_array()?;
    names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
}

/// Labels as numbers of classes, and the classes' names.
pub(super) fn assign(
    labels: Option<Vec<u32>>,
    names: Option<Vec<String>>,
    wanted: Option<&[String]>,
) -> std::result::Result<(Vec<u32>, Option<Vec<String>>), String> {
    let Some(mut labels) = labels else {
        return match wanted {
            Some(_) => Err("labels are needed: a column of whole numbers called label, without gaps".to_owned()),
            None => Ok((Vec::new(), None)),
        };
    };
    let most = labels.iter().max().copied().unwrap_or(0);
    let known = names.as_ref().map_or(MOST_CLASSES as usize, Vec::len);
    if most as usize >= known {
        return Err(format!("class {most} is not one of the {known} that the file names"));
    }
    let classes = match (names, wanted) {
        (Some(names), Some(wanted)) => {
            let places: Vec<Option<usize>> =
                names.iter().map(|name| wanted.iter().position(|class| class == name)).collect();
            for label in &mut labels {
                let place = places[*label as usize];
                *label = place.ok_or_else(|| {
                    format!("the class {} is not one of the {} classes", names[*label as usize], wanted.len())
                })? as u32;
            }
            wanted.to_vec()
        }
        (None, Some(wanted)) if most as usize >= wanted.len() => {
            return Err(format!("class {most} is not one of the {} classes", wanted.len()));
        }
        (None, Some(wanted)) => wanted.to_vec(),
        (Some(names), None) => names,
        (None, None) => (0..=most).map(|class| class.to_string()).collect(),
    };
    Ok((labels, Some(classes)))
}
