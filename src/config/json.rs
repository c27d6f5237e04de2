//! `config.json`: typed reading of its fields, and writing as Python's `json.dumps(indent=2, sort_keys=True)` does.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

use crate::config::{MaeConfig, Size};
use crate::{Error, Result};

const MODEL_TYPE: &str = "vit_mae";

/// The fields of a `config.json` that have not been taken yet.
struct Fields(BTreeMap<String, Value>);

impl Fields {
    /// Replaces `field` where the file has `key`.
    fn take<T>(&mut self, key: &str, field: &mut T, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<()> {
        if let Some(value) = self.0.remove(key) {
            *field = read(&value)
                .ok_or_else(|| Error::Config(format!("{key} must be {expected}, found {}", short(&value))))?;
        }
        Ok(())
    }

    fn whole(&mut self, key: &str, field: &mut usize) -> Result<()> {
        self.take(key, field, "a whole number", whole)
    }

    fn number(&mut self, key: &str, field: &mut f64) -> Result<()> {
        self.take(key, field, "a number", Value::as_f64)
    }

    fn flag(&mut self, key: &str, field: &mut bool) -> Result<()> {
        self.take(key, field, "true or false", Value::as_bool)
    }

    fn size(&mut self, key: &str, field: &mut Size) -> Result<()> {
        self.take(key, field, "a whole number or a pair [height, width]", |value| match value.as_array() {
            None => whole(value).map(Size::from),
            Some(pair) => match pair.as_slice() {
                [height, width] => whole(height).zip(whole(width)).map(Size::from),
                _ => None,
            },
        })
    }
}

fn whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| usize::try_from(number).ok())
}

/// A value as it stands in the file, cut where it is long.
fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { text.chars().take(57).collect::<String>() + "..." }
}

pub(super) fn read(text: &str) -> Result<MaeConfig> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| Error::Config(format!("the file is not valid JSON: {error}")))?;
    let Value::Object(object) = value else {
        return Err(Error::Config(format!("a JSON object was expected, found {}", short(&value))));
    };
    let mut fields = Fields(object.into_iter().collect());
    let given = fields.0.len();
    let mut model_type = MODEL_TYPE.to_owned();
    fields.take("model_type", &mut model_type, "a string", |value| value.as_str().map(str::to_owned))?;
    if model_type != MODEL_TYPE {
        return Err(Error::Config(format!(
            "model_type is {model_type:?}, and only {MODEL_TYPE:?} is supported: this is another kind of model"
        )));
    }
    let mut config = MaeConfig::default();
    fields.whole("hidden_size", &mut config.hidden_size)?;
    fields.whole("num_hidden_layers", &mut config.num_hidden_layers)?;
    fields.whole("num_attention_heads", &mut config.num_attention_heads)?;
    fields.whole("intermediate_size", &mut config.intermediate_size)?;
    fields.take("hidden_act", &mut config.hidden_act, "a string", |value| value.as_str().map(str::to_owned))?;
    fields.number("hidden_dropout_prob", &mut config.hidden_dropout_prob)?;
    fields.number("attention_probs_dropout_prob", &mut config.attention_probs_dropout_prob)?;
    fields.number("initializer_range", &mut config.initializer_range)?;
    fields.number("layer_norm_eps", &mut config.layer_norm_eps)?;
    fields.size("image_size", &mut config.image_size)?;
    fields.size("patch_size", &mut config.patch_size)?;
    fields.whole("num_channels", &mut config.num_channels)?;
    fields.flag("qkv_bias", &mut config.qkv_bias)?;
    fields.whole("decoder_num_attention_heads", &mut config.decoder_num_attention_heads)?;
    fields.whole("decoder_hidden_size", &mut config.decoder_hidden_size)?;
    fields.whole("decoder_num_hidden_layers", &mut config.decoder_num_hidden_layers)?;
    fields.whole("decoder_intermediate_size", &mut config.decoder_intermediate_size)?;
    fields.number("mask_ratio", &mut config.mask_ratio)?;
    fields.flag("norm_pix_loss", &mut config.norm_pix_loss)?;
    // An empty object is a model of defaults; one with other things alone is another file.
    if given > 0 && fields.0.len() == given {
        let found: Vec<&str> = fields.0.keys().take(3).map(String::as_str).collect();
        return Err(Error::Config(format!(
            "this is no configuration of a model: it has none of the fields of ViTMAEConfig, but {}",
            found.join(", ")
        )));
    }
    config.other = fields.0;
    Ok(config)
}

pub(super) fn write(config: &MaeConfig) -> String {
    let size = |size: Size| match size {
        Size { height, width } if height == width => Value::from(height),
        Size { height, width } => Value::from(vec![height, width]),
    };
    let mut fields = config.other.clone();
    fields.entry("architectures".into()).or_insert_with(|| Value::from(vec!["ViTMAEForPreTraining"]));
    let known: [(&str, Value); 20] = [
        ("model_type", Value::from(MODEL_TYPE)),
        ("hidden_size", Value::from(config.hidden_size)),
        ("num_hidden_layers", Value::from(config.num_hidden_layers)),
        ("num_attention_heads", Value::from(config.num_attention_heads)),
        ("intermediate_size", Value::from(config.intermediate_size)),
        ("hidden_act", Value::from(config.hidden_act.as_str())),
        ("hidden_dropout_prob", Value::from(config.hidden_dropout_prob)),
        ("attention_probs_dropout_prob", Value::from(config.attention_probs_dropout_prob)),
        ("initializer_range", Value::from(config.initializer_range)),
        ("layer_norm_eps", Value::from(config.layer_norm_eps)),
        ("image_size", size(config.image_size)),
        ("patch_size", size(config.patch_size)),
        ("num_channels", Value::from(config.num_channels)),
        ("qkv_bias", Value::from(config.qkv_bias)),
        ("decoder_num_attention_heads", Value::from(config.decoder_num_attention_heads)),
        ("decoder_hidden_size", Value::from(config.decoder_hidden_size)),
        ("decoder_num_hidden_layers", Value::from(config.decoder_num_hidden_layers)),
        ("decoder_intermediate_size", Value::from(config.decoder_intermediate_size)),
        ("mask_ratio", Value::from(config.mask_ratio)),
        ("norm_pix_loss", Value::from(config.norm_pix_loss)),
    ];
    fields.extend(known.map(|(key, value)| (key.to_owned(), value)));
    let mut text = String::new();
    put(&mut text, &Value::Object(fields.into_iter().collect()), 0);
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
