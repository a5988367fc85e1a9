//! In what two stacks differ.

use serde_json::{Value, json};

use super::config::ModelConfig;

/// The same settings with nothing left to defaults that follow from others.
fn explicit(model: &ModelConfig) -> ModelConfig {
    let mut model = model.clone();
    (model.kv_heads, model.head_width) = (Some(model.kv_heads()), Some(model.head_width()));
    let hidden = model.hidden;
    if let Some(moe) = &mut model.moe {
        moe.hidden = Some(moe.hidden(hidden));
    }
    model
}

/// The first setting of `wanted` that differs in `found`, by its key, with both values.
pub fn difference(wanted: &ModelConfig, found: &ModelConfig) -> Option<(String, Value, Value)> {
    difference_in("", &json!(explicit(wanted)), &json!(explicit(found)))
}

fn difference_in(key: &str, wanted: &Value, found: &Value) -> Option<(String, Value, Value)> {
    let Value::Object(settings) = wanted else {
        return (wanted != found).then(|| (key.to_owned(), wanted.clone(), found.clone()));
    };
    let key_of = |name: &String| if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
    let inner = |(name, value): (&String, &Value)| {
        difference_in(&key_of(name), value, found.get(name).unwrap_or(&Value::Null))
    };
    settings.iter().find_map(inner)
}
