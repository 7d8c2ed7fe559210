//! What configurations are taken for, and what is said of wrong ones.

#![allow(clippy::unwrap_used)]

use super::*;
#[cfg(feature = "images")]
use crate::vision::Size;

fn load(text: &str, variables: &[(&str, &str)]) -> Result<Settings, ConfigError> {
    let variables = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    let start = Start { variables: BTreeMap::from_iter(variables), ..Start::default() };
    let ours = start.variables.clone().into_iter().collect();
    Settings::from_parts(text, Environment::with_prefix("FAASWAP").source(Some(ours)), &start)
}

fn digest() -> String {
    format!("sha256:{}", "ab".repeat(32))
}

fn with(text: &str) -> Settings {
    load(&format!("function = \"team/f\"\nmodel = \"{}\"\n{text}", digest()), &[]).unwrap()
}

#[test]
fn a_function_and_a_model_are_all_that_must_be_said() {
    let settings = with("");
    assert_eq!(settings.brokers, [Target::Socket("/run/faaswap/broker.sock".into())]);
    assert_eq!(settings.model_name, "team/f");
    assert_eq!(settings.slo, Slo { deadline: Duration::from_secs(1), percentile: 9800 });
    assert_eq!((settings.priority, settings.late), (Priority::Latency, Late::Serve));
    assert_eq!((settings.batching, settings.tf32), (Batching::Exact, Tf32::Node));
    assert_eq!((with("tf32 = \"on\"").tf32, with("tf32 = \"off\"").tf32), (Tf32::On, Tf32::Off));
    assert_eq!(settings.listen, "0.0.0.0:9463".parse().unwrap());
    assert_eq!(settings.metrics_listen, Some("0.0.0.0:9465".parse().unwrap()));
    assert_eq!(settings.upstream, None);
    assert_eq!(settings.ignored, Vec::<String>::new());
}

#[test]
fn the_environment_wins_over_the_file_and_says_everything_that_the_file_can() {
    let digest = digest();
    let variables = [
        ("FAASWAP_BROKER_ADDR", "10.0.0.1:9470"),
        ("FAASWAP_FUNCTION", "g"),
        ("FAASWAP_MODEL", &digest),
        ("FAASWAP_MODEL_NAME", "resnet"),
        ("FAASWAP_SLO_MS", "50"),
        ("FAASWAP_SLO_PERCENTILE", "99.5"),
        ("FAASWAP_PRIORITY", "batch"),
        ("FAASWAP_LATE", "refuse"),
        ("FAASWAP_BATCHING", "off"),
        ("FAASWAP_TF32", "off"),
        ("FAASWAP_LISTEN", "127.0.0.1:0"),
        ("FAASWAP_METRICS_LISTEN", "off"),
        ("FAASWAP_UPSTREAM", "http://127.0.0.1:8082"),
        ("FAASWAP_SLAB_REQUEST_MIB", "8"),
        ("FAASWAP_SLAB_RESPONSE_MIB", "4"),
        ("FAASWAP_BODY_MIB_MAX", "3"),
        ("FAASWAP_SERVICE_HOST", "10.0.0.9"),
    ];
    let settings = load("function = \"f\"\nslo_ms = 7", &variables).unwrap();
    assert_eq!(settings.brokers[1..], [Target::Address("10.0.0.1:9470".into())]);
    assert_eq!(settings.function.as_str(), "g");
    assert_eq!(settings.model_name, "resnet");
    assert_eq!(settings.slo, Slo { deadline: Duration::from_millis(50), percentile: 9950 });
    assert_eq!((settings.priority, settings.late), (Priority::Batch, Late::Refuse));
    assert_eq!((settings.batching, settings.tf32), (Batching::Off, Tf32::Off));
    assert_eq!(settings.metrics_listen, None);
    assert_eq!(settings.upstream.unwrap(), "127.0.0.1:8082");
    assert_eq!((settings.slab.request, settings.slab.response), (Bytes::mib(8), Bytes::mib(4)));
    assert_eq!(settings.body_max, Bytes::mib(3));
    assert_eq!(settings.ignored, ["service_host"], "kubernetes sets such variables; they are no mistake");
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let text = "model = \"/nowhere/m.onnx\"\nslo_ms = 0\nslo_percentile = \"100\"\npriority = \"high\"\n\
                late = 3\nbatching = \"yes\"\ntf32 = true\nlisten = \"9463\"\nmetrics_listen = \"x\"\nupstream = \"https://h:1\"\nbroker_addr = \"nohost\"\n\
                slab_request_mib = 1000\nslab_response_mib = 1000\nbody_mib_max = -1\nlog = \"=x=\"\ncolour = \"red\"";
    let mistakes = load(text, &[]).unwrap_err().0;
    let all = mistakes.join("\n");
    for expected in [
        "function is not set; set it in the file or as FAASWAP_FUNCTION",
        "model: '/nowhere/m.onnx' is neither",
        "slo_ms: '0' is no whole number from 1",
        "slo_percentile: '100' is no percentile",
        "priority: 'high' is none of latency, batch",
        "late: '3' is none of serve, refuse",
        "batching: 'yes' is none of off, exact, on",
        "tf32: 'true' is none of on, off",
        "listen: '9463' is no address",
        "metrics_listen: 'x' is no address",
        "upstream: 'https://h:1' is no host:port",
        "broker_addr: 'nohost' is no host:port",
        "slab_request_mib + slab_response_mib",
        "body_mib_max: '-1'",
        "log: '=x='",
        "colour is no setting; there are: batching, body_mib_max,",
    ] {
        assert!(all.contains(expected), "{expected} is missing in:\n{all}");
    }
    assert_eq!(mistakes.len(), 16, "{all}");
}

#[test]
fn a_model_is_a_digest_a_file_with_its_data_or_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let graph = folder.path().join("m.onnx");
    std::fs::write(&graph, b"graph").unwrap();
    let model = |path: &Path, more: &str| load(&format!("function='f'\nmodel='{}'\n{more}", path.display()), &[]);
    assert_eq!(model(folder.path(), "").unwrap().model, ModelRef::Folder(folder.path().to_owned()));
    let data = vec!["a.bin".to_owned(), "b.bin".to_owned()];
    for list in ["model_data = [\"a.bin\", \"b.bin\"]", "model_data = \"a.bin, b.bin\""] {
        assert_eq!(model(&graph, list).unwrap().model, ModelRef::File { graph: graph.clone(), data: data.clone() });
    }
    let short = load("function='f'\nmodel='sha256:12'", &[]).unwrap_err().to_string();
    assert!(short.contains("64 hexadecimal digits"), "{short}");
}

#[test]
fn a_percentile_has_two_decimals_at_most() {
    assert_eq!(read::percentile("98"), Ok(9800));
    assert_eq!(read::percentile("99.9"), Ok(9990));
    assert_eq!(read::percentile("99.99"), Ok(9999));
    assert_eq!(read::percentile("0.01"), Ok(1));
    for bad in ["0", "100", "99.999", "-1", "+1", "x", "", "9.x", "700.00"] {
        assert!(read::percentile(bad).is_err(), "{bad}");
    }
}

#[test]
fn brokers_are_looked_for_at_the_socket_then_where_told_then_on_the_node() {
    let digest = digest();
    let variables = [
        ("FAASWAP_FUNCTION", "f"),
        ("FAASWAP_MODEL", &*digest),
        ("FAASWAP_BROKER_SOCKET", "/s"),
        ("FAASWAP_BROKER_ADDR", "broker:1"),
        ("HOST_IP", "fd00::7"),
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
    ];
    let address = |text: &str| Target::Address(text.to_owned());
    let expected = [
        Target::Socket("/s".into()),
        address("broker:1"),
        address("[fd00::7]:9470"),
        address("gpu-broker.faaswap-system.svc:9470"),
    ];
    assert_eq!(load("", &variables).unwrap().brokers, expected);
}

#[test]
fn a_command_or_a_mode_makes_the_sidecar_the_functions_front() {
    let model = [("FAASWAP_MODEL", "/not/there.onnx"), ("HOSTNAME", "resize-image-7d9f8b6c5d-x2x4z")];
    let handler = [("fprocess", "python index.py"), ("upstream_url", "http://127.0.0.1:5000/")];
    let settings = load("", &[&model[..], &handler[..]].concat()).unwrap();
    assert_eq!((settings.function.as_str(), settings.listen.to_string().as_str()), ("resize-image", "127.0.0.1:9463"));
    assert_eq!(settings.metrics_listen.unwrap().port(), 8081);
    assert_eq!(settings.upstream.unwrap(), "127.0.0.1:5000");
    let watchdog = settings.watchdog.unwrap();
    assert_eq!(watchdog.command, ["python", "index.py"]);
    let alone = [&model[..], &[("FAASWAP_MODE", "watchdog"), ("OPENFAAS_NAME", "o")][..]].concat();
    let alone = load("", &alone).unwrap();
    assert_eq!((alone.function.as_str(), alone.watchdog.unwrap().command.len()), ("o", 0));
    let side =
        load("", &[&model[..], &handler[..], &[("FAASWAP_MODE", "side"), ("FAASWAP_FUNCTION", "f")][..]].concat());
    assert!(side.unwrap_err().to_string().contains("neither a file"), "a side service's model must be there");
}

#[test]
fn a_file_names_its_model_relative_to_itself_and_a_variable_to_where_we_are() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("m.onnx"), b"graph").unwrap();
    let file = folder.path().join("function.toml");
    std::fs::write(&file, "function = 'f'\nmodel = 'm.onnx'").unwrap();
    let model = Settings::load(Some(&file), &Start::default()).unwrap().model;
    assert_eq!(model, ModelRef::File { graph: folder.path().join("m.onnx"), data: vec![] });
    let variables = BTreeMap::from([("FAASWAP_MODEL".to_owned(), "m.onnx".to_owned())]);
    let elsewhere = Settings::load(Some(&file), &Start { variables, ..Start::default() }).unwrap_err();
    assert!(elsewhere.to_string().contains("'m.onnx' is neither"), "{elsewhere}");
}

#[test]
fn a_url_is_a_model_with_its_digest_its_data_and_its_credentials() {
    let hex = "ab".repeat(32);
    let remote = |more: &str| match load(&format!("function='f'\n{more}"), &[]).unwrap().model {
        ModelRef::Remote(remote) => remote,
        other @ (ModelRef::Digest(_) | ModelRef::File { .. } | ModelRef::Folder(_)) => panic!("{other:?}"),
    };
    let one =
        remote(&format!("model='http://h/m.onnx?sig=1#sha256={hex}'\nmodel_auth_file='/s/auth'\nmodel_mib_max=5"));
    assert_eq!((one.digest.unwrap().hex(), one.limits.bytes_max), (hex, Bytes::mib(5)));
    assert_eq!(one.credentials, crate::fetch::Credentials::File("/s/auth".into()));
    let several = remote("model='https://h/a/m.onnx'\nmodel_data=['w.bin', 'https://cdn/b/v.bin?sig=2']");
    let shown: Vec<_> = several.data.iter().map(|(name, url)| format!("{name} {url}")).collect();
    assert_eq!(shown, ["w.bin https://h/a/w.bin", "v.bin https://cdn/b/v.bin"]);
    assert_eq!(several.digest, None, "https without a digest is possible");
}

#[test]
fn what_is_wrong_with_a_url_is_said_without_its_secrets() {
    let hex = "ab".repeat(32);
    for (text, said) in [
        ("model='http://h/m.onnx'", "pin it by #sha256="),
        ("model='https://u:s3cret@h/m.onnx'", "credentials"),
        ("model='s3://bucket/m.onnx'", "presigned"),
        ("model='https://h/m.onnx#md5=s3cret'", "64 hexadecimal"),
        (&format!("model='https://h/m.onnx#sha256={hex}'\nmodel_data='w.bin'"), "set model_digest"),
        (&format!("model='https://h/m#sha256={hex}'\nmodel_digest='sha256:{}'", "cd".repeat(32)), "which one"),
        ("model='https://h/m'\nmodel_auth='Bearer s3cret'\nmodel_auth_file='/s'", "only one of them"),
        ("model='https://h/m'\nmodel_data='https://h/'", "no file name"),
    ] {
        let mistakes = load(&format!("function='f'\n{text}"), &[]).unwrap_err().to_string();
        assert!(mistakes.contains(said) && !mistakes.contains("s3cret"), "{text}: {mistakes}");
    }
    let hidden = load("function='f'\nmodel='https://h/m?sig=s3cret'\nmodel_auth='Bearer s3cret'", &[]).unwrap();
    assert!(!format!("{hidden:?}").contains("s3cret"), "{hidden:?}");
}

#[cfg(feature = "images")]
#[test]
fn images_and_labels_have_sections_of_their_own_and_variables_win_over_them() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("labels.txt"), "cat\ndog \n").unwrap();
    let file = folder.path().join("function.toml");
    let text = format!(
        "function = 'f'\nmodel = '{}'\n[preprocess]\nkind = 'image'\nresize = 256\ncrop = [224, 192]\ncolors = 'bgr'\n\
         mean = [0.485, 0.456, 0.406]\nstd = 0.5\n[postprocess]\nkind = 'labels'\nlabels = 'labels.txt'\nsoftmax = true\ntop = 3",
        digest()
    );
    std::fs::write(&file, text).unwrap();
    let Vision { before, after } = Settings::load(Some(&file), &Start::default()).unwrap().vision.unwrap();
    assert_eq!((before.resize, before.crop), (Some(Size::Shorter(256)), Some((224, 192))));
    assert_eq!((before.mean, before.std, before.white), (vec![0.485, 0.456, 0.406], vec![0.5], 1.0));
    let after = after.unwrap();
    assert_eq!((after.labels, after.softmax, after.top), (vec!["cat".to_owned(), "dog".to_owned()], true, 3));
    let variables = [("FAASWAP_PREPROCESS_KIND", "image"), ("FAASWAP_PREPROCESS_RESIZE", "8, 9")];
    let model = format!("function = 'f'\nmodel = '{}'\n", digest());
    let set = load(&format!("{model}[preprocess]\nresize = 7"), &variables).unwrap().vision.unwrap();
    assert_eq!(set.before.resize, Some(Size::Exact(8, 9)));
}

#[cfg(feature = "images")]
#[test]
fn what_is_wrong_with_images_and_labels_is_said() {
    let model = format!("function = 'f'\nmodel = '{}'\n", digest());
    for (text, said) in [
        ("[preprocess]\nkind = 'sound'", "preprocess_kind: 'sound' is none of image"),
        ("[preprocess]\nkind = 'image'\nsize = 3", "preprocess_size is no setting"),
        ("[preprocess]\nkind = 'image'\ncrop = [1, 2, 3]", "neither one side nor [height, width]"),
        ("[preprocess]\nkind = 'image'\nresize = 0", "preprocess_resize: '0'"),
        ("[preprocess]\nkind = 'image'\nmean = [1, 2]", "2 numbers are given, expected 1 or 3"),
        ("[preprocess]\nkind = 'image'\nstd = 0", "divided by 0"),
        ("[preprocess]\nkind = 'image'\nwhite = 'nan'", "no number"),
        ("[postprocess]\nkind = 'labels'\n", "what does the function take"),
        ("[preprocess]\nkind='image'\n[postprocess]\nkind='labels'\nlabels='/nowhere'", "'/nowhere' cannot be read"),
        ("upstream = 'h:1'\n[preprocess]\nkind = 'image'", "who answers requests to /"),
    ] {
        let mistakes = load(&format!("{model}{text}"), &[]).unwrap_err().to_string();
        assert!(mistakes.contains(said), "{text}: {mistakes}");
    }
}

#[test]
fn a_front_is_known_on_its_node_by_namespace_and_name_and_to_its_clients_by_name() {
    let front = |variables: &[(&str, &str)], namespace: Option<&str>| {
        let all = [("FAASWAP_MODE", "watchdog"), ("FAASWAP_MODEL", "/m.onnx"), ("OPENFAAS_NAME", "ocr")];
        let variables = all.iter().chain(variables).map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let variables = BTreeMap::from_iter(variables);
        let ours = variables.clone().into_iter().collect();
        let start = Start { variables, namespace: namespace.map(str::to_owned), ..Start::default() };
        let settings =
            Settings::from_parts("", Environment::with_prefix("FAASWAP").source(Some(ours)), &start).unwrap();
        (settings.function.to_string(), settings.model_name)
    };
    let pair = |function: &str, model: &str| (function.to_owned(), model.to_owned());
    assert_eq!(front(&[], None), pair("ocr", "ocr"), "where no namespace is known it is as it was");
    assert_eq!(front(&[], Some("team-a\n")), pair("team-a/ocr", "ocr"));
    assert_eq!(front(&[("OPENFAAS_NAMESPACE", "fn")], Some("team-a")), pair("fn/ocr", "ocr"));
    assert_eq!(front(&[("POD_NAMESPACE", "b"), ("OPENFAAS_NAMESPACE", "fn")], None), pair("b/ocr", "ocr"));
    // The injector says the whole name.
    assert_eq!(front(&[("FAASWAP_FUNCTION", "team-a/ocr")], Some("team-a")), pair("team-a/ocr", "ocr"));
    assert_eq!(front(&[("FAASWAP_FUNCTION", "team-b/ocr")], Some("team-a")), pair("team-b/ocr", "team-b/ocr"));
    assert_eq!(front(&[("FAASWAP_MODEL_NAME", "m")], Some("team-a")), pair("team-a/ocr", "m"));
}
