{{/* What the operator may do in a namespace that it watches, and nothing more. */}}
{{- define "trimtab.rules" -}}
- apiGroups: [trimtab.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch, delete] # deletes jobs whose time to live is over
- apiGroups: [trimtab.dev]
  resources: [modelendpoints]
  verbs: [get, list, watch, create, patch] # a rollout's endpoint and its model
- apiGroups: [trimtab.dev]
  resources: [finetunejobs/status, modelendpoints/status]
  verbs: [patch]
- apiGroups: [trimtab.dev]
  resources: [finetunejobs/finalizers, modelendpoints/finalizers]
  verbs: [update] # asked by OwnerReferencesPermissionEnforcement, which some clusters run
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete] # never changed
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, delete] # never changed
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [pods, persistentvolumeclaims]
  verbs: [get, list, watch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, list] # lists the Warnings about one Job or pod that does not get on
{{- end -}}
