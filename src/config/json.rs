//! `config.json`: reading, with messages that name the field, and writing as Python's `json.dumps(indent=2, sort_keys=True)` does.

use std::fmt::Write;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config::MaeConfig;
use crate::{Error, Result};

const MODEL_TYPE: &str = "vit_mae";

pub(super) fn read(text: &str) -> Result<MaeConfig> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| Error::Config(format!("the file is not valid JSON: {error}")))?;
    let Value::Object(mut object) = value else {
        return Err(Error::Config(format!("a JSON object was expected, found {}", short(&value))));
    };
    let given = object.len();
    match object.remove("model_type") {
        None => (),
        Some(Value::String(kind)) if kind == MODEL_TYPE => (),
        Some(Value::String(kind)) => {
            return Err(Error::Config(format!(
                "model_type is {kind:?}, and only {MODEL_TYPE:?} is supported: this is another kind of model"
            )));
        }
        Some(other) => return Err(Error::Config(format!("model_type must be a string, found {}", short(&other)))),
    }
    let object = Value::Object(object);
    let config = MaeConfig::deserialize(&object).map_err(|error| Error::Config(wrong_type(&object, &error)))?;
    // An empty object is a model of defaults; an object with unknown keys only is some other file.
    if given > 0 && config.other.len() == given {
        let found: Vec<&str> = config.other.keys().take(3).map(String::as_str).collect();
        return Err(Error::Config(format!(
            "this is not the configuration of a model: it has no field of ViTMAEConfig, only {}",
            found.join(", ")
        )));
    }
    Ok(config)
}

/// Which field has a value of the wrong type: the first that cannot be read alone. The expected type is that of its default.
fn wrong_type(object: &Value, error: &serde_json::Error) -> String {
    let mut fields = object.as_object().into_iter().flatten();
    let Some((key, value)) = fields.find(|(key, value)| MaeConfig::deserialize(json!({ *key: value })).is_err()) else {
        return error.to_string();
    };
    let expected = match fields_of(&MaeConfig::default()).get(key) {
        _ if key == "image_size" || key == "patch_size" => "a whole number or a pair [height, width]",
        Some(Value::Bool(_)) => "true or false",
        Some(Value::String(_)) => "a string",
        Some(Value::Number(number)) if number.is_f64() => "a number",
        _ => "a whole number",
    };
    format!("{key} must be {expected}, found {}", short(value))
}

/// A value as it stands in the file, cut where it is long.
fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { text.chars().take(57).collect::<String>() + "..." }
}

fn fields_of(config: &MaeConfig) -> Map<String, Value> {
    // A struct with strings for keys always becomes an object.
    serde_json::to_value(config).ok().and_then(|value| value.as_object().cloned()).unwrap_or_default()
}

pub(super) fn write(config: &MaeConfig) -> String {
    let mut fields = fields_of(config);
    fields.insert("model_type".into(), MODEL_TYPE.into());
    fields.entry("architectures").or_insert_with(|| json!(["ViTMAEForPreTraining"]));
    let mut text = String::new();
    put(&mut text, &Value::Object(fields), 0);
    text.push('\n');
    text
}

/// Appends `value` at a depth of `indent` spaces.
fn put(text: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Array(items) if !items.is_empty() => {
            put_lines(text, ['[', ']'], indent, items, |text, item| put(text, item, indent + 2));
        }
        Value::Object(fields) if !fields.is_empty() => {
            let mut fields: Vec<_> = fields.iter().collect();
            // Python sorts integer keys (`id2label`) as numbers.
            fields.sort_by_key(|(key, _)| (key.parse::<i64>().unwrap_or(i64::MAX), key.as_str()));
            put_lines(text, ['{', '}'], indent, &fields, |text, (key, value)| {
                let _ = write!(text, "{}: ", Value::from(key.as_str()));
                put(text, value, indent + 2);
            });
        }
        Value::Number(number) if number.is_f64() => put_float(text, number.as_f64().unwrap_or_default()),
        other => {
            let _ = write!(text, "{other}");
        }
    }
}

fn put_lines<T>(text: &mut String, brackets: [char; 2], indent: usize, items: &[T], item: impl Fn(&mut String, &T)) {
    text.push(brackets[0]);
    for (place, element) in items.iter().enumerate() {
        text.push_str(if place == 0 { "\n" } else { ",\n" });
        text.extend(std::iter::repeat_n(' ', indent + 2));
        item(text, element);
    }
    text.push('\n');
    text.extend(std::iter::repeat_n(' ', indent));
    text.push(brackets[1]);
}

/// Python's `repr`: as Rust's, but for a sign and two digits in the exponent.
fn put_float(text: &mut String, value: f64) {
    let rust = format!("{value:?}");
    match rust.split_once('e') {
        None => text.push_str(&rust),
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            let _ = write!(text, "{digits}e{sign}{exponent:0>2}");
        }
    }
}
