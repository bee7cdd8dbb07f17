{{/* Name of every object of the release. */}}
{{- define "finetune-operator.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "finetune-operator.labels" -}}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "finetune-operator.fullname" .) "default") -}}
{{- end -}}

{{- define "finetune-operator.image" -}}
{{- $repository := required "image.repository: name the operator's image, as in --set image.repository=registry.example.com/finetune-operator" .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.progressSecretName" -}}
{{- printf "%s-progress-tls" (include "finetune-operator.fullname" .) -}}
{{- end -}}

{{/* The settings file: the values under `config`, and where the progress endpoint is reached. */}}
{{- define "finetune-operator.settings" -}}
{{- $_ := required "config.images.trainer: name the trainer image, as in --set config.images.trainer=registry.example.com/finetune-trainer:0.1.0" .Values.config.images.trainer -}}
{{- $_ := required "config.images.inference: name the inference image, as in --set config.images.inference=registry.example.com/finetune-inference:0.1.0" .Values.config.images.inference -}}
{{- $config := deepCopy .Values.config -}}
{{- $service := printf "%s-progress.%s.svc" (include "finetune-operator.fullname" .) .Release.Namespace -}}
{{- $port := int .Values.config.progress.port -}}
{{- $_ := set $config "progress" (dict "url" (printf "https://%s:%d" $service $port) "port" $port "tlsSecretName" (include "finetune-operator.progressSecretName" .) "namespace" .Release.Namespace) -}}
{{- toYaml $config -}}
{{- end -}}

{{/* What the operator may do in a namespace with jobs: as a ClusterRole, or as a Role in each watched namespace. */}}
{{- define "finetune-operator.rules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch, patch]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [update]
# Owner references that block deletion need this where the admission plugin for them is on.
- apiGroups: [finetune.dev]
  resources: [finetunejobs/finalizers]
  verbs: [update]
# The record is replaced only as it was read; everything else is applied on the server's side.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create, get, list, update, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [create, get, list, patch, delete]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [create, get, list, watch, patch, delete]
# Jobs are made once and never changed.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [create, get, list, watch, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [create, get, list, watch, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [create, get, list, patch, delete]
# What goes with the pods of an endpoint is applied and removed by name.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create, patch, delete]
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# Warnings about what does not move, and news about jobs.
- apiGroups: [""]
  resources: [events]
  verbs: [create, list]
{{- end -}}
