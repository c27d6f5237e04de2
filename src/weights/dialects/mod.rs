//! Dialects: how programs name and lay out the same parameters.
//!
//! A dialect is one file with a table, and its line in [`DIALECTS`]. Rules replace the beginning of a name; in a pattern `*`
//! stands for a number, that of a block.

mod facebook;
mod keras;
mod transformers;

use super::store::Store;

/// Every dialect but transformers', which has no marks: its names are the published ones.
const DIALECTS: &[&Dialect] = &[&facebook::DIALECT, &keras::DIALECT];

/// How a stored name begins, how the published one does, and how the parameter lies in the stored tensor.
type Rule = (&'static str, &'static str, View);

/// The names and layouts of one program.
#[derive(Debug)]
pub(crate) struct Dialect {
    /// Whose names these are.
    pub name: &'static str,
    /// A file is in this dialect if one of its names begins with one of these.
    marks: &'static [&'static str],
    /// Blocks: how the stored names begin, and the published ones.
    blocks: &'static [(&'static str, &'static str)],
    /// What follows inside a block. Rules with one stored name make several parameters of it.
    inside: &'static [Rule],
    /// Outside of blocks.
    outside: &'static [Rule],
}

/// How a parameter lies in a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// It is that tensor.
    Whole,
    /// Part `.0` of `.1` equal parts along the first axis.
    Part(usize, usize),
    /// Axis `i` of the parameter is axis `.0[i]` of the tensor.
    Axes(&'static [usize]),
}

impl Dialect {
    /// The dialect of a store.
    pub fn of(store: &dyn Store) -> &'static Self {
        let is = |dialect: &Self| {
            (0..store.count()).any(|index| {
                let name = store.tensor(index).name;
                dialect.marks.iter().any(|mark| name.starts_with(mark))
            })
        };
        DIALECTS.iter().find(|dialect| is(dialect)).unwrap_or(&&transformers::DIALECT)
    }

    /// Whether files in it have the published names or transformers' other ones.
    pub fn is_published(&self) -> bool {
        self.marks.is_empty()
    }

    /// The parameters in the tensor called `name`, under their published names. A name without a rule stays as it is.
    pub fn published(&self, name: &str) -> Vec<(String, View)> {
        self.rename(name, |stored, published| (stored, published))
    }

    /// The name of the tensor that holds the parameter with this published name.
    pub fn stored(&self, name: &str) -> String {
        self.rename(name, |stored, published| (published, stored)).swap_remove(0).0
    }

    /// Every name that the rules make of `name`, at least one. `direction` orders the stored and the published side of a rule.
    fn rename<'a>(
        &self,
        name: &str,
        direction: impl Fn(&'a str, &'a str) -> (&'a str, &'a str),
    ) -> Vec<(String, View)> {
        let apply = |rules: &'static [Rule], start: String, name: &str| {
            let renamed = rules.iter().filter_map(|&(stored, published, view)| {
                let (from, to) = direction(stored, published);
                let (number, rest) = strip(name, from)?;
                Some((start.clone() + &to.replace('*', number) + rest, view))
            });
            let renamed: Vec<_> = renamed.collect();
            if renamed.is_empty() { vec![(start + name, View::Whole)] } else { renamed }
        };
        let block = self.blocks.iter().find_map(|&(stored, published)| {
            let (from, to) = direction(stored, published);
            let (number, rest) = strip(name, from)?;
            Some(apply(self.inside, to.replace('*', number), rest))
        });
        block.unwrap_or_else(|| apply(self.outside, String::new(), name))
    }
}

/// What `*` stands for at the beginning of `name`, and what follows the pattern; `None` if `name` does not begin with it.
fn strip<'a>(name: &'a str, pattern: &str) -> Option<(&'a str, &'a str)> {
    let Some((before, after)) = pattern.split_once('*') else { return Some(("", name.strip_prefix(pattern)?)) };
    let rest = name.strip_prefix(before)?;
    let (number, rest) = rest.split_at(rest.find(|character: char| !character.is_ascii_digit())?);
    (!number.is_empty()).then_some((number, rest.strip_prefix(after)?))
}

impl View {
    /// The parameter's shape in a tensor of this shape; `None` if the tensor cannot be seen so.
    pub fn shape(self, stored: &[usize]) -> Option<Vec<usize>> {
        match self {
            Self::Whole => Some(stored.to_vec()),
            Self::Part(_, parts) => {
                let (rows, rest) = stored.split_first()?;
                (rows % parts == 0).then(|| [&[rows / parts], rest].concat())
            }
            Self::Axes(order) => {
                (order.len() == stored.len()).then(|| order.iter().map(|&axis| stored[axis]).collect())
            }
        }
    }

    /// The parameter's numbers among those of a tensor of shape `stored`; `scratch` is overwritten where they change places.
    pub fn of<'a>(self, stored: &[usize], values: &'a [f32], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        match self {
            Self::Whole => values,
            Self::Part(part, parts) => &values[values.len() / parts * part..][..values.len() / parts],
            Self::Axes(order) => {
                // Sizes of the parameter, and how far apart neighbours along an axis lie in the tensor.
                let axes: Vec<(usize, usize)> =
                    order.iter().map(|&axis| (stored[axis], stored[axis + 1..].iter().product())).collect();
                scratch.clear();
                scratch.extend((0..values.len()).map(|place| {
                    let (mut rest, mut from) = (place, 0);
                    for (size, step) in axes.iter().rev() {
                        from += rest % size * step;
                        rest /= size;
                    }
                    values[from]
                }));
                scratch
            }
        }
    }
}

/// Whether `name` (published) belongs to the decoder.
pub(crate) fn is_decoder(name: &str) -> bool {
    name.starts_with("decoder.")
}

/// Whether `name` (published) belongs to a part that other models put on an encoder, and that an encoder does not need.
pub(crate) fn is_head(name: &str) -> bool {
    ["classifier.", "vit.pooler."].iter().any(|start| name.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_dialect_lead_to_the_published_ones() {
        let (hf, fb, tf) = (&transformers::DIALECT, &facebook::DIALECT, &keras::DIALECT);
        for (dialect, saved, expected) in [
            (hf, "vit.layers.10.attention.q_proj.bias", "vit.encoder.layer.10.attention.attention.query.bias"),
            (hf, "layers.0.mlp.fc2.weight", "vit.encoder.layer.0.output.dense.weight"),
            (hf, "encoder.layer.3.layernorm_after.weight", "vit.encoder.layer.3.layernorm_after.weight"),
            (hf, "decoder.decoder_encoder.layer.1.output.dense.bias", "decoder.decoder_layers.1.output.dense.bias"),
            (hf, "decoder.decoder_layers.1.mlp.fc1.bias", "decoder.decoder_layers.1.intermediate.dense.bias"),
            (hf, "embeddings.cls_token", "vit.embeddings.cls_token"),
            (hf, "layernorm.weight", "vit.layernorm.weight"),
            (hf, "decoder.decoder_norm.weight", "decoder.decoder_norm.weight"),
            (hf, "classifier.weight", "classifier.weight"),
            (hf, "vit.layers.", "vit.layers."),
            (hf, "", ""),
            (fb, "decoder_blocks.7.mlp.fc1.bias", "decoder.decoder_layers.7.intermediate.dense.bias"),
            (fb, "decoder_pos_embed", "decoder.decoder_pos_embed"),
            (fb, "blocks.x.norm1.bias", "blocks.x.norm1.bias"),
            (fb, "blocks.2.ls1.gamma", "vit.encoder.layer.2.ls1.gamma"),
            (tf, "vit/encoder/layer_._12/output/dense/kernel:0", "vit.encoder.layer.12.output.dense.weight"),
            (tf, "decoder/decoder_layers.3/layernorm_after/beta:0", "decoder.decoder_layers.3.layernorm_after.bias"),
        ] {
            let [(published, _)] = &dialect.published(saved)[..] else { panic!("{saved}") };
            assert_eq!(published, expected);
        }
        for (name, stored) in [
            ("vit.encoder.layer.3.attention.attention.value.bias", "blocks.3.attn.qkv.bias"),
            ("decoder.mask_token", "mask_token"),
            ("decoder.decoder_norm.weight", "decoder_norm.weight"),
        ] {
            assert_eq!((fb.stored(name).as_str(), hf.stored(name).as_str()), (stored, name));
        }
    }
}
