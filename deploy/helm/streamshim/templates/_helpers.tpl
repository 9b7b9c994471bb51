{{- define "streamshim.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "streamshim.selector" -}}
app.kubernetes.io/name: streamshim
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "streamshim.labels" -}}
{{ include "streamshim.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "streamshim.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "streamshim.name" .) -}}
{{- end -}}

{{- define "streamshim.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag | default (printf "v%s" $.Chart.AppVersion) }}{{- end -}}
{{- end -}}
{{- end -}}
