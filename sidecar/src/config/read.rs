//! Reads one value after the other and collects what is wrong with each.

use std::{collections::BTreeSet, net::SocketAddr, ops::RangeInclusive, path::PathBuf};

use ::config::{Config, Map, Value};
use faaswap_protocol::{Bytes, FunctionName, limits::SLAB_BYTES_MAX};
use http::uri::Authority;

use super::{BROKER_PORT, BROKER_SERVICE, ConfigError, Start};
use crate::broker::{SlabSizes, Target};

/// Reads keys and remembers which were asked for.
pub(crate) struct Reader {
    table: Map<String, Value>,
    known: BTreeSet<&'static str>,
    mistakes: Vec<String>,
}

/// All keys in one row: `resize` in the section `[preprocess]` is `preprocess_resize`, as it is in variables, which win.
fn table(config: &Config) -> Map<String, Value> {
    let mut flat = Map::new();
    let mut sections = Vec::new();
    for (key, value) in config.cache.clone().into_table().unwrap_or_default() {
        match value.clone().into_table() {
            Ok(section) => sections.push((key, section)),
            Err(_) => drop(flat.insert(key, value)),
        }
    }
    for (section, keys) in sections {
        for (key, value) in keys {
            flat.entry(format!("{section}_{key}")).or_insert(value);
        }
    }
    flat
}

impl Reader {
    pub(super) fn new(config: &Config) -> Self {
        Self { table: table(config), known: BTreeSet::new(), mistakes: Vec::new() }
    }

    pub(crate) fn mistake(&mut self, what: String) {
        self.mistakes.push(what);
    }

    /// Keys that nobody asked for.
    pub(super) fn unknown(&self, config: &Config) -> Vec<String> {
        let mut keys: Vec<_> = table(config).into_keys().filter(|key| !self.known.contains(key.as_str())).collect();
        keys.sort();
        keys
    }

    /// One mistake per key of the file that nobody asked for.
    pub(super) fn refuse_unknown(&mut self, file: &Config) {
        let known: Vec<_> = self.known.iter().copied().collect();
        for key in self.unknown(file) {
            self.mistakes.push(format!("{key} is no setting; there are: {}", known.join(", ")));
        }
    }

    pub(super) fn finish<T>(self, value: Option<T>) -> Result<T, ConfigError> {
        match value {
            Some(value) if self.mistakes.is_empty() => Ok(value),
            Some(_) | None => Err(ConfigError(self.mistakes)),
        }
    }

    /// The value of a key that is set to something.
    fn value(&mut self, key: &'static str) -> Option<&Value> {
        self.known.insert(key);
        self.table.get(key)
    }

    /// Reads a key; `None`: it is not set, or set wrongly, which is noted.
    pub(crate) fn parse<T>(&mut self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let text = self.value(key)?.clone().into_string().map_err(|_| "a text or number is expected".to_owned());
        match text.as_deref().map(str::trim) {
            Ok("") => None,
            Ok(text) => parse(text).map_err(|why| self.mistake(format!("{key}: {why}"))).ok(),
            Err(why) => {
                let mistake = format!("{key}: {why}");
                self.mistake(mistake);
                None
            }
        }
    }

    /// Reads a key that has no default.
    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let before = self.mistakes.len();
        let value = self.parse(key, parse);
        if value.is_none() && self.mistakes.len() == before {
            self.mistake(format!("{key} is not set; set it in the file or as FAASWAP_{}", key.to_uppercase()));
        }
        value
    }

    pub(crate) fn text(&mut self, key: &'static str) -> Option<String> {
        self.parse(key, |text| Ok(text.to_owned()))
    }

    pub(crate) fn number(&mut self, key: &'static str, allowed: RangeInclusive<u64>) -> Option<u64> {
        self.parse(key, |text| {
            let number = text.parse().ok().filter(|n| allowed.contains(n));
            number.ok_or_else(|| format!("'{text}' is no whole number from {} to {}", allowed.start(), allowed.end()))
        })
    }

    pub(crate) fn one_of<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        self.parse(key, |text| {
            let found = choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            found.ok_or_else(|| format!("'{text}' is none of {}", names.join(", ")))
        })
    }

    /// A TOML array of texts, or one text with commas.
    pub(super) fn list(&mut self, key: &'static str) -> Vec<String> {
        let texts: Option<Vec<String>> = self.value(key).and_then(|value| {
            let members = value.clone().into_array().ok()?;
            members.into_iter().map(|member| member.into_string().ok()).collect()
        });
        match texts {
            Some(texts) => texts,
            None => self.parse(key, |text| Ok(split(text))).unwrap_or_default(),
        }
    }
}

fn split(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("'{text}' is no address such as 0.0.0.0:9463"))
}

pub(super) fn address_or_off(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" { Ok(None) } else { address(text).map(Some).map_err(|why| format!("{why}, nor off")) }
}

pub(super) fn host_and_port(text: &str) -> Result<Authority, String> {
    let authority = text.parse::<Authority>().ok().filter(|a| a.port_u16().is_some() && !a.as_str().contains('@'));
    authority.ok_or_else(|| format!("'{text}' is no host:port"))
}

/// `host:port`, with `http://` in front or without.
pub(crate) fn upstream(text: &str) -> Result<Authority, String> {
    let bare = text.strip_prefix("http://").unwrap_or(text);
    host_and_port(bare.strip_suffix('/').unwrap_or(bare)).map_err(|why| format!("{why} nor http://host:port"))
}

/// Percent with at most two decimals, as hundredths.
pub(super) fn percentile(text: &str) -> Result<u16, String> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| text.parse::<u16>().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
    let hundredths = match decimals.len() {
        1 => digits(decimals).map(|tenths| tenths * 10),
        2 => digits(decimals),
        _ => None,
    };
    let sum = digits(whole).zip(hundredths).and_then(|(whole, part)| whole.checked_mul(100)?.checked_add(part));
    sum.filter(|n| (1..=9999).contains(n))
        .ok_or_else(|| format!("'{text}' is no percentile from 0.01 to 99.99 with at most two decimals, such as 98"))
}

pub(super) fn log_filter(text: &str) -> Result<String, String> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("'{text}' is no log filter such as info or faaswap_sidecar=debug: {error}")),
    }
}

/// Where brokers may listen, nearest first.
pub(super) fn brokers(from: &mut Reader, start: &Start) -> Vec<Target> {
    let socket = from.text("broker_socket").unwrap_or_else(|| "/run/faaswap/broker.sock".to_owned());
    let mut brokers = vec![Target::Socket(PathBuf::from(socket))];
    let address = from.parse("broker_addr", host_and_port).map(|authority| authority.to_string());
    brokers.extend(address.map(Target::Address));
    if let Some(node) = start.variable("HOST_IP").and_then(|ip| ip.parse::<std::net::IpAddr>().ok()) {
        brokers.push(Target::Address(SocketAddr::from((node, BROKER_PORT)).to_string()));
    }
    // Every pod has this variable; elsewhere nobody could resolve the name.
    if start.variable("KUBERNETES_SERVICE_HOST").is_some() {
        brokers.push(Target::Address(BROKER_SERVICE.to_owned()));
    }
    brokers
}

/// The function's name: set, or behind a front what the platform calls it, in its namespace. Functions of two namespaces
/// meet in the node's broker, and may have one name.
pub(super) fn function(from: &mut Reader, start: &Start, is_front: bool) -> Option<FunctionName> {
    let parse = |text: &str| text.parse::<FunctionName>().map_err(|e| e.to_string());
    if from.text("function").is_none()
        && is_front
        && let Some(name) = name_of_platform(start)
        && let Ok(name) = parse(&start.namespace().map_or_else(|| name.clone(), |space| format!("{space}/{name}")))
    {
        return Some(name);
    }
    from.required("function", parse)
}

/// What clients call the model where nothing is said: a front's know the function by its name in the namespace.
pub(super) fn model_name(function: &FunctionName, start: &Start, is_front: bool) -> String {
    let name = function.as_str();
    let inside = start.namespace().and_then(|space| name.strip_prefix(space)?.strip_prefix('/'));
    inside.filter(|_| is_front).unwrap_or(name).to_owned()
}

/// What OpenFaaS or Knative call the function; else the pod's name without what its Deployment appended.
fn name_of_platform(start: &Start) -> Option<String> {
    if let Some(name) = start.variable("OPENFAAS_NAME").or_else(|| start.variable("K_SERVICE")) {
        return Some(name.to_owned());
    }
    let parts: Vec<_> = start.variable("HOSTNAME")?.split('-').collect();
    let is_pod = parts.len() > 2 && parts.last().is_some_and(|hash| hash.len() == 5);
    Some(if is_pod { parts.get(..parts.len() - 2)?.join("-") } else { parts.join("-") })
}

/// The halves of the slab, within what one may have.
pub(super) fn slab(from: &mut Reader) -> SlabSizes {
    let slab = SlabSizes {
        request: from.number("slab_request_mib", 1..=1023).map_or(SlabSizes::default().request, Bytes::mib),
        response: from.number("slab_response_mib", 1..=1023).map_or(SlabSizes::default().response, Bytes::mib),
    };
    if slab.request.get() + slab.response.get() > SLAB_BYTES_MAX.get() {
        from.mistake(format!(
            "slab_request_mib + slab_response_mib: {} + {} is more than the {SLAB_BYTES_MAX} that a slab may have",
            slab.request, slab.response,
        ));
    }
    slab
}
