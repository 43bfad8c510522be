//! Flags that sidecars and gateways share.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Context, bail, ensure};
use mesh_model::{ClusterId, Locality, SpiffeId, TrustDomain};
use mesh_runtime::{Right, RunAs, ports};
use mesh_xds::{NodeInfo, NodeKind};
use serde_json::{Map, Value, json};

use crate::{limits::LimitArgs, restart::RestartArgs};

/// Flags of a data-plane process.
#[derive(Debug, Clone, clap::Args)]
pub struct ProxyArgs {
    /// Go on as this user, when started as root: `UID` or `UID:GID`, by number. Its files must be the user's; of root's
    /// rights only ports below 1024 stay, and interception by TPROXY where the metadata says so.
    #[arg(long, env = "FLOTILLA_RUN_AS", value_name = "UID[:GID]")]
    pub run_as: Option<RunAs>,
    /// Control plane, host:port of its xDS and certificate service.
    #[arg(long, env = "FLOTILLA_DISCOVERY", default_value = "127.0.0.1:15012")]
    pub discovery: String,
    /// Root certificate of the mesh, PEM; proves the control plane before the first certificate.
    #[arg(long, env = "FLOTILLA_ROOT_CERT", default_value = "/var/run/secrets/flotilla/root-cert.pem")]
    pub root_cert: PathBuf,
    /// File with the workload's bearer token; read again for every use.
    #[arg(long, env = "FLOTILLA_TOKEN_FILE", default_value = "/var/run/secrets/tokens/istio-token")]
    pub token_file: PathBuf,
    /// Address of the workload.
    #[arg(long, env = "INSTANCE_IP")]
    pub ip: IpAddr,
    /// Workload name.
    #[arg(long, env = "POD_NAME")]
    pub workload: String,
    /// Namespace.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Service account.
    #[arg(long, env = "SERVICE_ACCOUNT", default_value = "default")]
    pub service_account: String,
    /// Cluster that the workload runs in.
    #[arg(long, env = "FLOTILLA_CLUSTER")]
    pub cluster: ClusterId,
    /// Network; defaults to the cluster.
    #[arg(long, env = "FLOTILLA_NETWORK")]
    pub network: Option<String>,
    /// Trust domain of the mesh.
    #[arg(long, env = "FLOTILLA_TRUST_DOMAIN", default_value = TrustDomain::DEFAULT)]
    pub trust_domain: TrustDomain,
    /// Labels of the workload, `key=value`, repeated or separated by commas.
    #[arg(long, value_delimiter = ',')]
    pub labels: Vec<String>,
    /// Where it runs, `region/zone/subzone`.
    #[arg(long, env = "FLOTILLA_LOCALITY", default_value = "")]
    pub locality: String,
    /// More node metadata, `KEY=JSON or text`, repeated.
    #[arg(long = "meta")]
    pub metadata: Vec<String>,
    /// Directory in which certificate and last configuration are kept, so that a restart needs no
    /// control plane.
    #[arg(long, env = "FLOTILLA_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Worker threads; 0 is one per core that the process may use. [default: `concurrency` of the mesh's ProxyConfig, or 0]
    #[arg(long)]
    pub concurrency: Option<usize>,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// How long connections may finish after SIGTERM, seconds; it ends earlier if none is left. An east-west gateway goes
    /// on accepting for a second or two before, while traffic moves to the cluster's other gateways.
    /// [default: the mesh's `terminationDrainDuration`, or 5]
    #[arg(long)]
    pub drain_seconds: Option<u64>,
    #[command(flatten)]
    pub restart: RestartArgs,
    /// Admin pages. [default: 127.0.0.1, at the mesh's `proxyAdminPort` or 15000]
    #[arg(long)]
    pub admin: Option<SocketAddr>,
    /// Readiness (`/healthz/ready`). [default: 0.0.0.0, at the mesh's `statusPort` or 15021]
    #[arg(long)]
    pub readiness: Option<SocketAddr>,
    /// Metrics (`/stats/prometheus`).
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], ports::PROXY_METRICS)))]
    pub metrics: SocketAddr,
    /// OTLP collector for spans, such as http://127.0.0.1:4317; where the mesh names a provider that this proxy can call, its
    /// spans go there instead.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub otlp: Option<String>,
}

impl ProxyArgs {
    /// The identity that the control plane is asked to certify.
    ///
    /// # Errors
    /// If namespace or service account cannot be part of a SPIFFE ID.
    pub fn identity(&self) -> anyhow::Result<SpiffeId> {
        SpiffeId::workload(&self.trust_domain, &self.namespace, &self.service_account)
            .context("--namespace and --service-account")
    }

    /// Rights that it keeps if it gives up root.
    #[must_use]
    pub fn rights(&self) -> Vec<Right> {
        let transparent = self.metadata.iter().any(|m| m == "INTERCEPTION_MODE=TPROXY");
        [Right::LowPorts].into_iter().chain(transparent.then_some(Right::Transparent)).collect()
    }

    /// Labels as a map.
    ///
    /// # Errors
    /// Names the label that is not `key=value`.
    pub fn label_map(&self) -> anyhow::Result<BTreeMap<String, String>> {
        self.labels
            .iter()
            .filter(|l| !l.is_empty())
            .map(|l| match l.split_once('=') {
                Some((k, v)) if !k.is_empty() => Ok((k.to_owned(), v.to_owned())),
                _ => bail!("--labels {l:?}: expected key=value"),
            })
            .collect()
    }

    /// The xDS node.
    ///
    /// # Errors
    /// Names the flag that is not valid.
    pub fn node(&self, kind: NodeKind) -> anyhow::Result<NodeInfo> {
        ensure!(
            !self.workload.is_empty() && !self.workload.contains('~') && !self.namespace.contains(['~', '.']),
            "--workload and --namespace must not be empty or contain '~' (or '.', in a namespace)"
        );
        let mut m = Map::new();
        let network = self.network.clone().unwrap_or_else(|| self.cluster.to_string());
        for (k, v) in [
            ("CLUSTER_ID", json!(self.cluster)),
            ("NETWORK", json!(network)),
            ("NAMESPACE", json!(self.namespace)),
            ("SERVICE_ACCOUNT", json!(self.service_account)),
            ("WORKLOAD_NAME", json!(self.workload)),
            ("INSTANCE_IPS", json!(self.ip.to_string())),
            ("MESH_ID", json!(self.trust_domain)),
            ("LABELS", json!(self.label_map()?)),
            ("GENERATOR", json!("flotilla")),
        ] {
            m.insert(k.to_owned(), v);
        }
        for entry in &self.metadata {
            let (k, v) =
                entry.split_once('=').with_context(|| format!("--meta {entry:?}: expected KEY=value"))?;
            let v = serde_json::from_str(v).unwrap_or_else(|_| Value::String(v.to_owned()));
            m.insert(k.to_owned(), v);
        }
        Ok(NodeInfo::proxy(
            kind,
            self.ip,
            &self.workload,
            &self.namespace,
            &format!("{}.svc.cluster.local", self.namespace),
            m,
            Locality::from(self.locality.clone()),
        ))
    }
}
