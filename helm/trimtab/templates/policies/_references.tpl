{{/*
Most distinct Secrets of one object. Each check of a right costs 350,000 of the 1,000,000 that one expression may cost
and of the 10,000,000 of a policy, so each name has a validation of its own.
*/}}
{{- define "trimtab.mostSecrets" -}}16{{- end -}}

{{/*
Variables `left0`, `left1`, …: the names without the first distinct 0, 1, …; CEL has neither a loop nor, before
Kubernetes 1.34, a way to drop what stands twice. Expects a variable `names`.
*/}}
{{- define "trimtab.secretVariables" -}}
{{- $most := int (include "trimtab.mostSecrets" .) -}}
- name: left0
  expression: variables.names
{{- range untilStep 1 (int (add $most 1)) 1 }}
{{- $before := printf "variables.left%d" (sub . 1) }}
- name: left{{ . }}
  expression: "{{ $before }}.filter(n, n != {{ $before }}[0])"
{{- end }}
{{- end -}}

{{- define "trimtab.secretValidations" -}}
{{- $most := int (include "trimtab.mostSecrets" .) -}}
- expression: variables.left{{ $most }}.size() == 0
  message: name at most {{ $most }} different Secrets; put the keys of one store into one Secret
{{- range until $most }}
- expression: >-
    variables.left{{ . }}.size() == 0 || authorizer.group('').resource('secrets').namespace(request.namespace)
    .name(variables.left{{ . }}[0]).check('get').allowed()
  messageExpression: >-
    'you may not get the Secret ' + variables.left{{ . }}[0] + ' of namespace ' + request.namespace
    + '; name another one, or ask for the right to get it'
  reason: Forbidden
{{- end }}
{{- end -}}

{{/* Which namespaces a policy is about. */}}
{{- define "trimtab.policyNamespaces" -}}
{{- with .Values.watchNamespaces }}
namespaceSelector:
  matchExpressions:
    - {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson . }}}
{{- end }}
{{- end -}}

{{/* The binding of a policy to the whole cluster: list of the root and the policy's name. */}}
{{- define "trimtab.policyBinding" -}}
{{- $root := index . 0 -}}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ index . 1 }}
  labels: {{- include "trimtab.labels" $root | nindent 4 }}
spec:
  policyName: {{ index . 1 }}
  validationActions: [Deny]
{{- end -}}
