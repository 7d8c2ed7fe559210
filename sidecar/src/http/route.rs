//! Which call a method and path mean. Exactly the paths of the protocol; anything else under `/v2` is told apart into
//! what the protocol knows but is not offered here, and what nobody knows.

use std::borrow::Cow;

use http::Method;

use crate::failure::Failure;

/// What is asked of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelCall {
    /// Name, inputs, outputs.
    Metadata,
    /// Whether it can be called.
    Ready,
    /// Its configuration.
    Config,
    /// Its statistics.
    Stats,
    /// An inference.
    Infer,
}

/// A call of the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call<'a> {
    /// Name, version and extensions of the server.
    Server,
    /// Whether the server lives.
    Live,
    /// Whether the server can take requests.
    Ready,
    /// The list of models.
    Models,
    /// Statistics of all models.
    AllStats,
    /// Something about one model.
    Model {
        /// Its name.
        name: Cow<'a, str>,
        /// Its version, or empty.
        version: &'a str,
        /// What.
        call: ModelCall,
    },
    /// The list of models with their states.
    Index,
    /// Load a model.
    Load(Cow<'a, str>),
    /// Unload a model.
    Unload(Cow<'a, str>),
}

/// Whether a path belongs to the protocol rather than to the handler.
pub fn is_protocol(path: &str) -> bool {
    path == "/v2" || path.starts_with("/v2/")
}

/// The call that a request means.
pub fn route<'a>(method: &Method, path: &'a str) -> Result<Call<'a>, Failure> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let call = call_of(&parts).ok_or_else(|| Failure::NotFound(format!("no such path: {path}")))??;
    let allow = match call {
        Call::Model { call: ModelCall::Infer, .. } | Call::Index | Call::Load(_) | Call::Unload(_) => "POST",
        Call::Server
        | Call::Live
        | Call::Ready
        | Call::Models
        | Call::AllStats
        | Call::Model { call: ModelCall::Metadata | ModelCall::Ready | ModelCall::Config | ModelCall::Stats, .. } => {
            "GET"
        }
    };
    let allowed = *method == allow || (allow == "GET" && *method == Method::HEAD);
    if allowed { Ok(call) } else { Err(Failure::WrongVerb { allow }) }
}

fn call_of<'a>(parts: &[&'a str]) -> Option<Result<Call<'a>, Failure>> {
    let not_offered = |what: &str| Some(Err(Failure::Unsupported(format!("{what} is not supported"))));
    Some(Ok(match *parts {
        ["v2"] => Call::Server,
        ["v2", "health", "live"] => Call::Live,
        ["v2", "health", "ready"] => Call::Ready,
        ["v2", "models"] => Call::Models,
        ["v2", "models", "stats"] => Call::AllStats,
        ["v2", "models", name, ref rest @ ..] if !name.is_empty() => return of_model(name, rest),
        ["v2", "repository", "index"] | ["v2", "repository", _, "index"] => Call::Index,
        ["v2", "repository", "models", name, "load"] | ["v2", "repository", _, "models", name, "load"] => {
            Call::Load(decoded(name))
        }
        ["v2", "repository", "models", name, "unload"] | ["v2", "repository", _, "models", name, "unload"] => {
            Call::Unload(decoded(name))
        }
        ["v2", "systemsharedmemory", ..] | ["v2", "cudasharedmemory", ..] => return not_offered("shared memory"),
        ["v2", "trace", "setting"] => return not_offered("tracing by request"),
        ["v2", "logging"] => return not_offered("log settings by request"),
        _ => return None,
    }))
}

fn of_model<'a>(name: &'a str, rest: &[&'a str]) -> Option<Result<Call<'a>, Failure>> {
    let (version, rest) = match *rest {
        ["versions", version, ref rest @ ..] if version.bytes().all(|b| b.is_ascii_digit()) && !version.is_empty() => {
            (version, rest)
        }
        _ => ("", rest),
    };
    let call = match *rest {
        [] => ModelCall::Metadata,
        ["ready"] => ModelCall::Ready,
        ["config"] => ModelCall::Config,
        ["stats"] => ModelCall::Stats,
        ["infer"] => ModelCall::Infer,
        ["generate" | "generate_stream"] | ["trace", "setting"] => {
            return Some(Err(Failure::Unsupported(format!("'{}' is not supported", rest.join("/")))));
        }
        _ => return None,
    };
    Some(Ok(Call::Model { name: decoded(name), version, call }))
}

/// Undoes percent-encoding; what is none stays as it is.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let [first, rest @ ..] = bytes {
        let hex = rest.get(..2).filter(|two| *first == b'%' && two.iter().all(u8::is_ascii_hexdigit));
        let hex = hex.and_then(|two| std::str::from_utf8(two).ok());
        let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        out.push(byte.unwrap_or(*first));
        bytes = if byte.is_some() { &rest[2..] } else { rest };
    }
    String::from_utf8_lossy(&out).into_owned().into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn status(method: &Method, path: &str) -> u16 {
        route(method, path).map_or_else(|failure| failure.verdict().status.as_u16(), |_| 200)
    }

    #[test]
    fn every_path_of_the_protocol_is_found() {
        for path in [
            "/v2",
            "/v2/",
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models",
            "/v2/models/stats",
            "/v2/models/m",
            "/v2/models/m/versions/1",
            "/v2/models/m/ready",
            "/v2/models/m/versions/1/ready",
            "/v2/models/m/config",
            "/v2/models/m/stats",
        ] {
            assert_eq!(status(&Method::GET, path), 200, "{path}");
            assert_eq!(status(&Method::POST, path), 405, "{path}");
        }
        for path in [
            "/v2/models/m/infer",
            "/v2/models/m/versions/1/infer",
            "/v2/repository/index",
            "/v2/repository/r/index",
            "/v2/repository/models/m/load",
            "/v2/repository/r/models/m/unload",
        ] {
            assert_eq!(status(&Method::POST, path), 200, "{path}");
            assert_eq!(status(&Method::GET, path), 405, "{path}");
        }
    }

    #[test]
    fn what_is_not_offered_is_told_from_what_nobody_knows() {
        for path in
            ["/v2/models/m/generate", "/v2/systemsharedmemory/status", "/v2/logging", "/v2/models/m/trace/setting"]
        {
            assert_eq!(status(&Method::GET, path), 501, "{path}");
        }
        for path in ["/v2/nothing", "/v2/models/m/versions/x/infer", "/v2/models/m/infer/more", "/v2/models//infer"] {
            assert_eq!(status(&Method::POST, path), 404, "{path}");
        }
    }

    #[test]
    fn a_name_is_decoded() {
        let name = |path| {
            let call = route(&Method::GET, path).unwrap();
            let Call::Model { name, .. } = call else { panic!("{call:?}") };
            name.into_owned()
        };
        assert_eq!(name("/v2/models/team%2Fresnet"), "team/resnet");
        assert_eq!(name("/v2/models/100%"), "100%");
        assert_eq!(name("/v2/models/%+1a"), "%+1a".to_owned());
    }
}
