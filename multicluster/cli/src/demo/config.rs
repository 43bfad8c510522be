//! Configuration of the demo, as a user would write it.

use std::fmt::Write;

use super::cluster::{Cluster, INGRESS_PORT, NAMESPACE, PORT};

/// Host of the page.
pub(crate) const HOST: &str = "bookstore.example";

/// Services, workloads, exports and (in the first cluster) the ingress.
pub(crate) fn application(c: &Cluster) -> String {
    let mut out = String::new();
    let mut seen = Vec::new();
    for w in &c.workloads {
        if !seen.contains(&w.service) {
            seen.push(w.service);
            let _ = write!(
                out,
                "apiVersion: v1\nkind: Service\nmetadata:\n  name: {s}\n  namespace: {NAMESPACE}\nspec:\n  \
                 selector:\n    app: {s}\n  ports:\n  - name: http\n    port: {PORT}\n---\n\
                 apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata:\n  name: {s}\n  \
                 namespace: {NAMESPACE}\n---\n",
                s = w.service
            );
        }
        let _ = write!(
            out,
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: {name}\n  namespace: \
             {NAMESPACE}\nspec:\n  address: {ip}\n  serviceAccount: {s}\n  locality: {c}/a\n  labels:\n    app: {s}\n    \
             version: {v}\n    security.istio.io/tlsMode: istio\n---\n",
            name = w.name(),
            ip = w.ip(),
            s = w.service,
            v = w.version,
            c = c.name,
        );
    }
    // Subsets are known to both sides of a call: to the caller that routes to them and to the gateway
    // that finds their pods.
    out.push_str(&subsets());
    out.push_str(MESH);
    if c.name == "west" {
        out.push_str(&ingress());
    }
    out
}

const MESH: &str = "---\napiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata:\n  name: mesh\nspec:\n  \
                    accessLogFile: /dev/stdout\n---\n";

fn ingress() -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata:\n  name: bookstore\n  namespace: {NAMESPACE}\nspec:\n  \
         selector:\n    istio: ingressgateway\n  servers:\n  - port:\n      number: {INGRESS_PORT}\n      name: http\n      \
         protocol: HTTP\n    hosts:\n    - {HOST}\n---\n\
         apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: bookstore\n  namespace: \
         {NAMESPACE}\nspec:\n  hosts:\n  - {HOST}\n  gateways:\n  - bookstore\n  http:\n  - route:\n    - destination:\n        \
         host: storefront\n        port:\n          number: {PORT}\n---\n"
    )
}

fn subsets() -> String {
    let mut out = format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata:\n  name: reviews\n  namespace: \
         {NAMESPACE}\nspec:\n  host: reviews\n  subsets:\n"
    );
    for v in ["v1", "v2", "v3"] {
        let _ = writeln!(out, "  - name: {v}\n    labels:\n      version: {v}");
    }
    out
}

fn reviews_service(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: reviews\n  namespace: \
         {NAMESPACE}\nspec:\n  hosts:\n  - reviews\n  http:\n{http}"
    )
}

/// 90 % v1, 10 % v3.
pub(crate) fn shifted() -> String {
    reviews_service(
        "  - route:\n    - destination:\n        host: reviews\n        subset: v1\n      weight: 90\n    - destination:\n        \
         host: reviews\n        subset: v3\n      weight: 10\n",
    )
}

/// v2 for one user, v1 for the others.
pub(crate) fn by_user(user: &str) -> String {
    reviews_service(&format!(
        "  - match:\n    - headers:\n        end-user:\n          exact: {user}\n    route:\n    - destination:\n        host: \
         reviews\n        subset: v2\n  - route:\n    - destination:\n        host: reviews\n        subset: v1\n"
    ))
}

/// A delay in front of reviews v2 that its caller's timeout catches: the fault is injected where
/// ratings is called from, the timeout where reviews is.
pub(crate) fn impatient(timeout: &str) -> String {
    reviews_service(&format!(
        "  - timeout: {timeout}\n    route:\n    - destination:\n        host: reviews\n        subset: v2\n"
    ))
}

/// Delays every call to ratings.
pub(crate) fn delayed_ratings(delay: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: ratings\n  namespace: \
         {NAMESPACE}\nspec:\n  hosts:\n  - ratings\n  http:\n  - fault:\n      delay:\n        fixedDelay: {delay}\n        \
         percentage:\n          value: 100\n    route:\n    - destination:\n        host: ratings\n"
    )
}

/// Only reviews may call ratings.
pub(crate) fn only_reviews() -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: ratings-viewer\n  namespace: \
         {NAMESPACE}\nspec:\n  selector:\n    matchLabels:\n      app: ratings\n  action: ALLOW\n  rules:\n  - from:\n    \
         - source:\n        principals:\n        - mesh.local/ns/{NAMESPACE}/sa/reviews\n"
    )
}
