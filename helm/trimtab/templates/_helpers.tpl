{{/* Name of the release's objects: `trimtab` for a release of that name. */}}
{{- define "trimtab.fullname" -}}
{{- ternary .Release.Name (printf "%s-trimtab" .Release.Name) (contains "trimtab" .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "trimtab.operator" -}}
{{ include "trimtab.fullname" . }}-operator
{{- end -}}

{{- define "trimtab.selector" -}}
app.kubernetes.io/name: trimtab
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "trimtab.labels" -}}
app.kubernetes.io/name: trimtab
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: trimtab
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Full name of an image: list of the root and one of operator, trainer, serving. */}}
{{- define "trimtab.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.image (index . 1) -}}
{{- $registry := default $root.Values.image.registry $root.Values.global.imageRegistry -}}
{{- if $registry }}{{ trimSuffix "/" $registry }}/{{ end -}}
{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default $root.Chart.AppVersion $image.tag }}{{ end -}}
{{- end -}}

{{/* Name of the user that the API server sees when the operator writes. */}}
{{- define "trimtab.operatorUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "trimtab.operator" . }}
{{- end -}}

{{- define "trimtab.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "trimtab.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
