"""What an administrator may set in the chart. Every model is closed: a misspelt value is refused, not ignored."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.alias_generators import to_camel

from trimtab_operator.core.settings import Settings

Text = Annotated[str, Field(max_length=4096)]
ObjectName = Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
NamespaceName = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
Duration = Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m|h)$")]
KubernetesObject = dict[str, Any]
"""A part of Kubernetes' own API, checked by the API server."""
Strings = dict[str, str]


class ChartModel(BaseModel):
    """A closed map of values."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class GlobalValues(BaseModel):
    """Helm's own `global`: open, since a parent chart puts its own values here."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="allow", frozen=True)

    image_registry: Text = Field(default="", description="Registry of all images; wins over image.registry.")


class PullPolicy(StrEnum):
    """When a node pulls the operator's image."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class Image(ChartModel):
    """One image, by tag or by digest."""

    repository: Annotated[str, Field(min_length=1, max_length=255)] = Field(
        default="", description="Name of the image below the registry."
    )
    tag: Annotated[str, Field(max_length=128)] = Field(default="", description="Tag; the chart's appVersion if empty.")
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = Field(
        default="", description="sha256:…; wins over tag."
    )


class Images(ChartModel):
    """Images of the operator and of what it starts."""

    registry: Text = Field(default="", description="Registry and path in front of each repository.")
    pull_policy: PullPolicy = Field(default=PullPolicy.IF_NOT_PRESENT, description="Of the operator's image.")
    operator: Image = Field(default=Image(repository="trimtab-operator"), description="The operator.")
    trainer: Image = Field(default=Image(repository="trimtab-trainer"), description="Prepare and training pods.")
    serving: Image = Field(default=Image(repository="trimtab-serving"), description="Serving pods.")


class LocalReference(ChartModel):
    """An object of the release's namespace."""

    name: ObjectName = Field(description="Its name.")


class Crds(ChartModel):
    """The custom resource definitions."""

    install: bool = Field(default=True, description="Install and upgrade them with the release.")
    keep: bool = Field(
        default=True, description="Keep them at uninstall: deleting a definition deletes every job and endpoint."
    )


class ServiceAccount(ChartModel):
    """The operator's ServiceAccount."""

    annotations: Strings = Field(default={}, description="Annotations.")


class Rbac(ChartModel):
    """Roles."""

    create: bool = Field(default=True, description="Roles and bindings of the operator.")
    aggregate: bool = Field(default=True, description="Add both kinds to the cluster's view, edit and admin roles.")


class Toggle(ChartModel):
    """A part of the chart that can be left out."""

    enabled: bool = Field(default=True, description="Install it.")


class AllowLists(Toggle):
    """Which images and service accounts jobs and endpoints may name."""

    images: list[Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\s'\"\\]+$")]] = Field(
        default=[],
        max_length=64,
        description="Images, or prefixes that end in `*`, e.g. registry.example.com/ml/*. Empty: any image.",
    )
    service_accounts: list[ObjectName] = Field(
        default=[], max_length=64, description="Service accounts beside `default`."
    )


class Admission(ChartModel):
    """ValidatingAdmissionPolicies; they need no webhook."""

    references: Toggle = Field(
        default=Toggle(),
        description="Who creates a job or an endpoint may get each Secret that it names, and update the endpoint that "
        "its rollout names.",
    )
    allow_lists: AllowLists = Field(
        default=AllowLists(), description="Which images and service accounts jobs and endpoints may name."
    )
    operator: Toggle = Field(
        default=Toggle(),
        description="The operator's ServiceAccount may create only pods of the restricted profile, without a token.",
    )


class Monitor(ChartModel):
    """How Prometheus finds the operator."""

    enabled: bool = Field(default=False, description="Create it; needs the Prometheus operator's CRDs.")
    interval: Duration = Field(default="30s", description="Time between two scrapes.")
    labels: Strings = Field(default={}, description="Labels by which your Prometheus selects it.")


class Labelled(ChartModel):
    """An optional object that is found by label."""

    enabled: bool = Field(default=False, description="Create it.")
    labels: Strings = Field(default={}, description="More labels.")


class Monitoring(ChartModel):
    """Objects for Prometheus and Grafana."""

    service_monitor: Monitor = Field(default=Monitor(), description="A Service for metrics, and a ServiceMonitor.")
    pod_monitor: Monitor = Field(default=Monitor(), description="A PodMonitor: no Service is needed.")
    prometheus_rule: Labelled = Field(default=Labelled(), description="Alerts, each with its remedy.")
    grafana_dashboard: Labelled = Field(
        default=Labelled(), description='A ConfigMap with the label grafana_dashboard: "1".'
    )


class NetworkPolicy(ChartModel):
    """What may talk to the operator, and it to whom."""

    enabled: bool = Field(default=False, description="Install a NetworkPolicy for the operator's pods.")
    metrics_from: list[KubernetesObject] = Field(
        default=[], description="Peers that may read /metrics, as in a NetworkPolicy; empty: any."
    )
    api_server_ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        default=[443, 6443], description="Ports at which the API server is reached."
    )


class Presets(ChartModel):
    """Ready-made jobs."""

    config_map: bool = Field(default=True, description="Put them into a ConfigMap of the release's namespace.")


class Selftest(ChartModel):
    """`helm test`: trains a tiny model on the cluster, as a FineTuneJob."""

    storage_class_name: Text = Field(default="", description="Of its claim; empty: the cluster's default.")
    storage: Annotated[str, Field(pattern=r"^[0-9]+(Mi|Gi)$")] = Field(default="1Gi", description="Size of its claim.")
    timeout_seconds: Annotated[int, Field(ge=60, le=86_400)] = Field(
        default=1200, description="How long the job may take, pulling images included."
    )
    resources: KubernetesObject = Field(
        default={"limits": {"cpu": "1", "memory": "3Gi"}}, description="Of the job's pods, as in a FineTuneJob."
    )


_SET_BY_THE_CHART = {
    "trainer_image",
    "serving_image",
    "operator_version",
    "watch_namespaces",
    "service_address",
    "metrics_port",
    "allow_file_uris",
    "queues",
    "lease_name",
    "lease_namespace",
    "identity",
}
"""Settings that follow from other values or from the cluster."""

OperatorSettings = create_model(
    "OperatorSettings",
    __base__=ChartModel,
    __doc__="Settings of the operator; what is absent takes the default.",
    **{
        name: (field.annotation, field)
        for name, field in Settings.model_fields.items()
        if name not in _SET_BY_THE_CHART
    },  # type: ignore[call-overload]
)


class Values(ChartModel):
    """All values of the chart."""

    global_: GlobalValues = Field(default=GlobalValues(), alias="global", description="Shared with other charts.")
    image: Images = Field(default=Images(), description="Images of the operator and of what it starts.")
    image_pull_secrets: list[LocalReference] = Field(
        default=[], description="Secrets for pulling the operator's image."
    )
    replicas: Annotated[int, Field(ge=1, le=9)] = Field(
        default=2, description="One leads, the others are warm and take over within seconds."
    )
    watch_namespaces: list[NamespaceName] = Field(
        default=[],
        description="Namespaces that the operator works in, by Roles there; empty: all, by a ClusterRole.",
    )
    settings: OperatorSettings = Field(
        default=OperatorSettings(), description="Settings of the operator; what is absent takes the default."
    )
    crds: Crds = Field(default=Crds(), description="The custom resource definitions.")
    rbac: Rbac = Field(default=Rbac(), description="Roles.")
    service_account: ServiceAccount = Field(default=ServiceAccount(), description="The operator's ServiceAccount.")
    admission: Admission = Field(default=Admission(), description="Policies that the API server enforces.")
    resources: KubernetesObject = Field(
        default={"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
        description="Of the operator's container.",
    )
    pod_annotations: Strings = Field(default={}, description="Annotations of the operator's pods.")
    pod_labels: Strings = Field(default={}, description="More labels of the operator's pods.")
    priority_class_name: Text = Field(default="", description="PriorityClass of the operator's pods.")
    node_selector: Strings = Field(default={}, description="Labels of the nodes for the operator.")
    tolerations: list[KubernetesObject] = Field(default=[], description="Taints that the operator tolerates.")
    affinity: KubernetesObject = Field(default={}, description="Affinity of the operator's pods.")
    topology_spread: Toggle = Field(default=Toggle(), description="Spread the replicas over nodes where possible.")
    pod_disruption_budget: Toggle = Field(
        default=Toggle(), description="With more than one replica: evict one at a time."
    )
    network_policy: NetworkPolicy = Field(
        default=NetworkPolicy(), description="What may talk to the operator, and it to whom."
    )
    monitoring: Monitoring = Field(default=Monitoring(), description="Objects for Prometheus and Grafana.")
    presets: Presets = Field(default=Presets(), description="Ready-made jobs.")
    selftest: Selftest = Field(default=Selftest(), description="What `helm test` runs.")
    extra_objects: list[KubernetesObject | str] = Field(
        default=[], description="More objects, rendered as templates, installed with the release."
    )
