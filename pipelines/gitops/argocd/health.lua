-- Health of a FineTuneJob for Argo CD, from the conditions that kstatus reads too.
local health = {status = "Progressing", message = "Waiting for the operator"}
local status = obj.status
if status == nil or status.conditions == nil or status.observedGeneration ~= obj.metadata.generation then
  return health
end
local conditions = {}
for _, condition in ipairs(status.conditions) do
  conditions[condition.type] = condition
end
local function holds(kind)
  return conditions[kind] ~= nil and conditions[kind].status == "True"
end
if holds("Stalled") then
  return {status = "Degraded", message = conditions.Stalled.message}
end
if holds("Suspended") then
  return {status = "Suspended", message = conditions.Suspended.message}
end
if holds("Ready") then
  return {status = "Healthy", message = conditions.Ready.message}
end
if conditions.Reconciling ~= nil then
  health.message = conditions.Reconciling.message
end
return health
