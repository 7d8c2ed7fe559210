//! What a pod's annotations ask for: every mistake is named with the value and what is allowed.

use std::collections::BTreeMap;

use clap::ValueEnum;

/// What all of our annotations and labels begin with.
pub const PREFIX: &str = "faaswap.dev/";
/// Set on what was injected.
pub const STATUS: &str = "faaswap.dev/status";

/// All annotations that mean something.
const KNOWN: [&str; 21] = [
    "batching",
    "function",
    "inject",
    "late",
    "mode",
    "model",
    "model-data",
    "model-digest",
    "model-name",
    "model-secret",
    "model-volume",
    "priority",
    "sidecar-cpu",
    "sidecar-image",
    "sidecar-memory",
    "slo-ms",
    "slo-percentile",
    "status",
    "tf32",
    "transport",
    "upstream",
];

/// What is put into the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A sidecar beside the function's containers.
    Side,
    /// Only the way to the broker: the function's image has its sidecar.
    Mount,
}

/// How a pod reaches the node's broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// The device plugin mounts the socket's folder; the scheduler counts slots.
    Slot,
    /// The socket's folder as a hostPath; not where Pod Security is `baseline` or `restricted`.
    Uds,
    /// The node's address; tensors travel in the frames.
    Tcp,
}

/// A pod's wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// What to put in.
    pub mode: Mode,
    /// How to reach the broker; `None`: as the operator set it.
    pub transport: Option<Transport>,
    /// The function's name on the node; `None`: from the pod.
    pub function: Option<String>,
    /// The volume of the pod that holds the model.
    pub model_volume: Option<String>,
    /// Whether the sidecar fetches its model, and so needs a place to put it.
    pub fetches: bool,
    /// The Secret with what the model's server wants to be told.
    pub model_secret: Option<String>,
    /// Settings that the sidecar is handed as they are, by the name of their variable.
    pub variables: BTreeMap<&'static str, String>,
    /// The sidecar's image; `None`: the operator's.
    pub image: Option<String>,
    /// Processor time that the sidecar asks for.
    pub cpu: String,
    /// Memory that the sidecar may take.
    pub memory: String,
}

/// What annotations come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is asked for.
    Nothing,
    /// This is asked for.
    Wish(Box<Wish>),
    /// These are wrong.
    Mistakes(Vec<String>),
}

/// Reads a pod's annotations and labels. A label opts in or out where no annotation says it.
pub fn read(annotations: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> Verdict {
    let mut reader = Reader { annotations, mistakes: Vec::new() };
    let inject = annotations.get("faaswap.dev/inject").or_else(|| labels.get("faaswap.dev/inject"));
    match inject.map(String::as_str) {
        Some("true") => {}
        None if annotations.contains_key("faaswap.dev/model") => {}
        Some("false") | None => return Verdict::Nothing,
        Some(other) => reader.mistake("inject", other, "true or false"),
    }
    reader.refuse_unknown();
    let wish = reader.wish();
    if reader.mistakes.is_empty() { Verdict::Wish(Box::new(wish)) } else { Verdict::Mistakes(reader.mistakes) }
}

struct Reader<'a> {
    annotations: &'a BTreeMap<String, String>,
    mistakes: Vec<String>,
}

impl Reader<'_> {
    fn mistake(&mut self, key: &str, value: &str, allowed: &str) {
        let value = shown(value);
        self.mistakes.push(format!("annotation {PREFIX}{key}: '{value}' is not allowed; allowed: {allowed}"));
    }

    fn refuse_unknown(&mut self) {
        for (key, value) in self.annotations {
            if let Some(name) = key.strip_prefix(PREFIX).filter(|name| !KNOWN.contains(name)) {
                self.mistakes
                    .push(format!("annotation {PREFIX}{name}: '{value}' means nothing; known: {}", KNOWN.join(", ")));
            }
        }
    }

    fn checked(&mut self, key: &str, allowed: &str, is_allowed: impl Fn(&str) -> bool) -> Option<String> {
        let value = self.annotations.get(&format!("{PREFIX}{key}"))?.trim();
        if is_allowed(value) {
            return Some(value.to_owned());
        }
        self.mistake(key, value, allowed);
        None
    }

    fn one_of<T>(&mut self, key: &str, choices: &[(&str, T)]) -> Option<T>
    where
        T: Copy,
    {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let value = self.checked(key, &names.join(", "), |value| names.contains(&value))?;
        choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice)
    }

    fn wish(&mut self) -> Wish {
        let mode = self.one_of("mode", &[("side", Mode::Side), ("mount", Mode::Mount)]).unwrap_or(Mode::Side);
        let transports = [
            ("slot", Some(Transport::Slot)),
            ("uds", Some(Transport::Uds)),
            ("tcp", Some(Transport::Tcp)),
            ("auto", None),
        ];
        let transport = self.one_of("transport", &transports).flatten();
        let names = "letters, digits and ._/- , at most 128, a letter or digit first";
        let quantity = "a quantity such as 100m or 64Mi";
        let variables = self.variables();
        if mode == Mode::Side && !self.annotations.contains_key("faaswap.dev/model") {
            self.mistakes.push(format!(
                "annotation {PREFIX}model is not set; allowed: sha256:<digest>, an https URL, or the path of a model below \
                 /models (or {PREFIX}mode: mount where the image has its sidecar)"
            ));
        }
        Wish {
            mode,
            transport,
            function: self.checked("function", names, is_name),
            model_volume: self.checked("model-volume", "the name of a volume of the pod", is_label),
            fetches: variables.get("FAASWAP_MODEL").is_some_and(|model| model.contains("://")),
            model_secret: self.checked("model-secret", "the name of a Secret with the key authorization", is_object),
            variables,
            image: self.checked("sidecar-image", "the name of an image", |v| {
                !v.is_empty() && !v.contains(char::is_whitespace)
            }),
            cpu: self.checked("sidecar-cpu", quantity, is_quantity).unwrap_or_else(|| "50m".to_owned()),
            memory: self.checked("sidecar-memory", quantity, is_quantity).unwrap_or_else(|| "256Mi".to_owned()),
        }
    }

    /// Whether nobody on the way can put another model in the place of this one.
    fn is_safe(&mut self, model: &str) -> bool {
        let pinned = model.contains("#sha256=") || self.annotations.contains_key("faaswap.dev/model-digest");
        let safe = !model.starts_with("http://") || pinned;
        if !safe {
            self.mistake("model", model, "over http:// only with #sha256=<digest> or with faaswap.dev/model-digest");
        }
        safe
    }

    /// What goes to the sidecar unchanged. It would refuse nonsense too, but only once the pod runs.
    fn variables(&mut self) -> BTreeMap<&'static str, String> {
        let mut variables = BTreeMap::new();
        let mut keep = |name, value: Option<String>| {
            if let Some(value) = value {
                variables.insert(name, value);
            }
        };
        let model = self.checked("model", MODELS, is_model).filter(|model| self.is_safe(model));
        keep(
            "FAASWAP_MODEL",
            model.map(|model| {
                let is_whole = model.starts_with("sha256:") || model.starts_with('/') || model.contains("://");
                if is_whole { model } else { format!("/models/{model}") }
            }),
        );
        keep(
            "FAASWAP_MODEL_DATA",
            self.checked("model-data", "names of files, with commas between", |v| !v.is_empty()),
        );
        let digest = "sha256:<64 hexadecimal digits>";
        keep("FAASWAP_MODEL_DIGEST", self.checked("model-digest", digest, is_digest));
        keep(
            "FAASWAP_MODEL_NAME",
            self.checked("model-name", "a name without spaces", |v| !v.is_empty() && !v.contains(char::is_whitespace)),
        );
        let ms = |v: &str| v.parse::<u64>().is_ok_and(|ms| (1..=3_600_000).contains(&ms));
        keep("FAASWAP_SLO_MS", self.checked("slo-ms", "whole milliseconds from 1 to 3600000", ms));
        let percentile = "0.01 to 99.99 with at most two decimals, such as 98";
        keep("FAASWAP_SLO_PERCENTILE", self.checked("slo-percentile", percentile, is_percentile));
        let one_of = |choices: &'static [&'static str]| move |v: &str| choices.contains(&v);
        keep("FAASWAP_PRIORITY", self.checked("priority", "latency, batch", one_of(&["latency", "batch"])));
        let batching = one_of(&["off", "exact", "on"]);
        keep("FAASWAP_BATCHING", self.checked("batching", "off, exact, on", batching));
        keep("FAASWAP_TF32", self.checked("tf32", "on, off", one_of(&["on", "off"])));
        keep("FAASWAP_LATE", self.checked("late", "serve, refuse", one_of(&["serve", "refuse"])));
        keep(
            "FAASWAP_UPSTREAM",
            self.checked("upstream", "host:port", |v| {
                v.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
            }),
        );
        variables
    }
}

fn is_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'/' | b'-');
    text.len() <= 128 && text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) && text.bytes().all(inner)
}

fn is_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty() && text.len() <= 63 && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// A value for people; of a URL not what may be secret in it, credentials and query.
fn shown(value: &str) -> String {
    let Some((scheme, rest)) = value.split_once("://") else { return value.to_owned() };
    let rest = rest.split('?').next().unwrap_or_default();
    format!("{scheme}://{}", rest.rsplit_once('@').map_or(rest, |(_, host)| host))
}

/// A DNS name, as most objects have it.
fn is_object(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    (1..=253).contains(&text.len()) && text.bytes().all(inner)
}

const MODELS: &str = "sha256:<64 hexadecimal digits>, an https:// or http:// URL without credentials, or a path below /models \
                      without '..'";

fn is_digest(text: &str) -> bool {
    let digest = text.strip_prefix("sha256:");
    digest.is_some_and(|digest| digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn is_model(text: &str) -> bool {
    if text.starts_with("sha256:") {
        return is_digest(text);
    }
    if let Some((scheme, rest)) = text.split_once("://") {
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let pinned = text.split_once("#").is_none_or(|(_, pin)| is_digest(&pin.replacen('=', ":", 1)));
        let plain = !host.is_empty() && !host.contains('@') && !text.contains(char::is_whitespace);
        return matches!(scheme, "http" | "https") && plain && pinned;
    }
    !text.is_empty() && !text.split('/').any(|part| part == "..")
}

fn is_percentile(text: &str) -> bool {
    let decimals = text.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let plain = text.bytes().all(|b| b.is_ascii_digit() || b == b'.') && !text.ends_with('.');
    plain && decimals <= 2 && text.parse::<f64>().is_ok_and(|p| (0.01..=99.99).contains(&p))
}

fn is_quantity(text: &str) -> bool {
    const UNITS: [&str; 9] = ["", "m", "k", "M", "G", "Ki", "Mi", "Gi", "Ti"];
    let number = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(number);
    number.parse::<f64>().is_ok_and(|n| n > 0.0) && UNITS.contains(&unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(annotations: &[(&str, &str)]) -> Verdict {
        let map =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (format!("{PREFIX}{k}"), (*v).to_owned())).collect();
        read(&map(annotations), &BTreeMap::new())
    }

    fn mistakes(annotations: &[(&str, &str)]) -> String {
        match read_all(annotations) {
            Verdict::Mistakes(mistakes) => mistakes.join("\n"),
            other @ (Verdict::Nothing | Verdict::Wish(_)) => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_is_done_unasked_and_a_pod_may_opt_out() {
        assert_eq!(read_all(&[]), Verdict::Nothing);
        assert_eq!(read_all(&[("model", "m.onnx"), ("inject", "false"), ("slo-ms", "never")]), Verdict::Nothing);
        let label = BTreeMap::from([("faaswap.dev/inject".to_owned(), "true".to_owned())]);
        let mode = BTreeMap::from([("faaswap.dev/mode".to_owned(), "mount".to_owned())]);
        assert!(matches!(read(&mode, &label), Verdict::Wish(wish) if wish.mode == Mode::Mount));
    }

    #[test]
    fn a_model_is_enough() {
        let Verdict::Wish(wish) = read_all(&[("model", "resnet/model.onnx")]) else { panic!("a wish") };
        assert_eq!(wish.variables, BTreeMap::from([("FAASWAP_MODEL", "/models/resnet/model.onnx".to_owned())]));
        let Verdict::Wish(batched) = read_all(&[("model", "m.onnx"), ("batching", "off")]) else { panic!("a wish") };
        assert_eq!(batched.variables["FAASWAP_BATCHING"], "off");
        for value in ["on", "off"] {
            let Verdict::Wish(told) = read_all(&[("model", "m.onnx"), ("tf32", value)]) else { panic!("a wish") };
            assert_eq!(told.variables["FAASWAP_TF32"], value);
        }
        assert_eq!((wish.mode, wish.transport, wish.memory.as_str()), (Mode::Side, None, "256Mi"));
    }

    #[test]
    fn each_mistake_names_the_annotation_the_value_and_what_is_allowed() {
        let all = mistakes(&[
            ("inject", "yes"),
            ("model", "../secret"),
            ("slo-ms", "0"),
            ("slo-percentile", "100"),
            ("priority", "high"),
            ("late", "never"),
            ("mode", "front"),
            ("transport", "smoke"),
            ("function", "-x"),
            ("sidecar-cpu", "much"),
            ("sidecar-image", "two words"),
            ("upstream", "nowhere"),
            ("batching", "yes"),
            ("tf32", "true"),
            ("batches", "on"),
        ]);
        for expected in [
            "annotation faaswap.dev/inject: 'yes' is not allowed; allowed: true or false",
            "annotation faaswap.dev/model: '../secret'",
            "annotation faaswap.dev/slo-ms: '0' is not allowed; allowed: whole milliseconds",
            "annotation faaswap.dev/slo-percentile: '100'",
            "annotation faaswap.dev/priority: 'high' is not allowed; allowed: latency, batch",
            "annotation faaswap.dev/late: 'never'",
            "annotation faaswap.dev/mode: 'front' is not allowed; allowed: side, mount",
            "annotation faaswap.dev/transport: 'smoke' is not allowed; allowed: slot, uds, tcp, auto",
            "annotation faaswap.dev/function: '-x'",
            "annotation faaswap.dev/sidecar-cpu: 'much'",
            "annotation faaswap.dev/sidecar-image: 'two words'",
            "annotation faaswap.dev/upstream: 'nowhere'",
            "annotation faaswap.dev/batching: 'yes' is not allowed; allowed: off, exact, on",
            "annotation faaswap.dev/tf32: 'true' is not allowed; allowed: on, off",
            "annotation faaswap.dev/batches: 'on' means nothing; known: batching, function, inject,",
        ] {
            assert!(all.contains(expected), "{expected} is missing in:\n{all}");
        }
        assert_eq!(all.lines().count(), 15, "{all}");
        assert!(mistakes(&[("inject", "true")]).contains("faaswap.dev/model is not set"));
    }

    #[test]
    fn a_model_may_be_fetched_and_is_pinned_where_others_could_change_it() {
        let pin = format!("#sha256={}", "ab".repeat(32));
        for url in ["https://h/m.onnx", "https://h/m.onnx?sig=1", &format!("http://h/m{pin}")] {
            let Verdict::Wish(wish) = read_all(&[("model", url), ("model-secret", "store.read")]) else {
                panic!("{url}")
            };
            assert_eq!((wish.variables["FAASWAP_MODEL"].as_str(), wish.fetches), (url, true));
            assert_eq!(wish.model_secret.as_deref(), Some("store.read"));
        }
        assert!(
            mistakes(&[("model", "http://h/m?sig=s3cret")]).contains("'http://h/m' is not allowed; allowed: over http")
        );
        let digest = format!("sha256:{}", "ab".repeat(32));
        assert!(matches!(read_all(&[("model", "http://h/m"), ("model-digest", &digest)]), Verdict::Wish(_)));
        for bad in ["s3://bucket/m", "https://u:s3cret@h/m", "https:///m", "https://h/m#sha256=12", "https://h/m x"] {
            let said = mistakes(&[("model", bad)]);
            assert!(
                said.contains("an https:// or http:// URL without credentials") && !said.contains("s3cret"),
                "{said}"
            );
        }
        assert!(mistakes(&[("model", "m.onnx"), ("model-digest", "12"), ("model-secret", "A b")]).lines().count() == 2);
    }

    #[test]
    fn quantities_and_percentiles_are_told_from_nonsense() {
        assert!(["1", "100m", "0.5", "64Mi", "1Gi"].into_iter().all(is_quantity));
        assert!(!["", "m", "0", "-1", "1mi", "1 Gi"].into_iter().any(is_quantity));
        assert!(["98", "99.9", "99.99", "0.01"].into_iter().all(is_percentile));
        assert!(!["100", "0", "99.999", "1e1", "9.", "+1", "inf"].into_iter().any(is_percentile));
    }
}
